"""Condensation over training: :class:`CondensationMonitor`, which measures a model on the same texts every N steps."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dispersion_kernels.blocks import is_pretrained, layer_numbers
from dispersion_kernels.condensation.cosine import LayerSums, Texts, mean_pairwise_cosine
from dispersion_kernels.condensation.measure import MeasuredModel, Reading, Run, Tap, check_count
from dispersion_kernels.condensation.plot import plot_training
from dispersion_kernels.condensation.records import Record, write_records
from dispersion_kernels.regularizer import Layers


class CondensationMonitor:
    """Mean pairwise cosine of each block on the same texts, every ``every`` optimiser steps of a training loop::

        monitor = CondensationMonitor(model, texts, tokenizer, every=100)
        for step in range(steps):
            log(monitor(step))  # a dict of numbers, empty between measurements
            ...
        monitor.plot("condensation.png")

    A measurement runs the model on the texts in evaluation mode and without gradients, compiled models eagerly. The
    model's modes, its gradients and the state of the random generators are what they were. Under FSDP all processes
    must measure.

    Args:
        model: model in training, as in :func:`measure_condensation`; in FSDP, DDP or PEFT, too.
        texts: strings, or batches of token ids, as in :func:`measure_condensation`; of more than ``count`` strings,
            ``count`` evenly spread ones. They are tokenised once.
        tokenizer: tokenizer of the model, for strings.
        every: number of optimiser steps between measurements.
        layers: ``"all"`` blocks, ``"last"``, ``"early_half"``, ``"late_half"``, or numbers, counted from 1.
        stack: name of the stack of blocks where there are several.
        max_length: tokens of a string, from its beginning. Batches are measured whole.
        count: number of strings measured at most.

    With strings, a measurement costs a forward pass of at most ``count * max_length`` tokens. With the defaults, 1,024
    tokens every 100 steps, that was 0.3% of the time of training the trainer's nano GPT-2 with 2,048 tokens a step,
    on a CPU.

    Raises:
        ValueError, TypeError: an argument is wrong, or no text has two tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        texts: Iterable[Any],
        tokenizer: Any = None,
        *,
        every: int = 100,
        layers: Layers = "all",
        stack: str | None = None,
        max_length: int = 128,
        count: int = 8,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}; give the model itself")
        for name, value in (("every", every), ("count", count)):
            check_count(name, value, 1)
        check_count("max_length", max_length, 2)
        self.every = every
        self.records: list[Record] = []
        """Measurements, in the order in which they were made."""
        self._model = _WholeModel(model, stack)
        self._numbers = layer_numbers(layers, len(self._model.stack.blocks))
        if isinstance(texts, Iterable) and not isinstance(texts, str | Tensor):
            texts = list(texts)
            if all(isinstance(text, str) for text in texts):
                texts = [texts[k * len(texts) // min(count, len(texts))] for k in range(min(count, len(texts)))]
        reading = Reading(tokenizer, max_length, True, (), batch_size=count)
        self._batches = [batch for batch in reading.batches(texts, self._model) if batch.numbers]
        if not self._batches:
            raise ValueError("texts has no text of at least two tokens, which a pair takes; give longer ones")

    def __call__(self, step: int) -> dict[str, float]:
        """Scalars of :meth:`measure` where ``step`` is a multiple of ``every`` that was not measured just before, else
        none."""
        measured = bool(self.records) and self.records[-1].step == step
        return {} if step % self.every or measured else self.measure(step)

    def measure(self, step: int) -> dict[str, float]:
        """Measures now, after ``step`` optimiser steps, and returns scalars to log: ``condensation/block 1`` and so on,
        and ``condensation/mean``, their mean. NaN where a hidden state is not finite."""
        sums = [_Means() for _ in self._numbers]
        run = Run([Tap(f"block {k}", k, one, None) for k, one in zip(self._numbers, sums, strict=True)])
        devices = {parameter.device for parameter in self._model.model.parameters() if parameter.is_cuda}
        with (
            torch.random.fork_rng(devices=list(devices)),
            torch.compiler.set_stance("force_eager"),
            self._model.evaluating(run),
        ):
            for batch in self._batches:
                run.begin(batch)
                self._model(batch.inputs)
                run.end()
        means = [torch.stack(one.values).double().mean().to("cpu") for one in sums]
        values = torch.stack(means).tolist()  # the devices' work is waited for here
        self.records.append(Record(step, {tap.name: value for tap, value in zip(run.taps, values, strict=True)}))
        return self.scalars()

    def scalars(self) -> dict[str, float]:
        """Scalars of the last measurement, as :meth:`measure` returned them."""
        means = self.records[-1].means
        named = {f"condensation/{name}": mean for name, mean in means.items()}
        return {**named, "condensation/mean": sum(means.values()) / len(means)}

    def save(self, path: str | Path) -> None:
        """Writes the records as JSON, which ``dispersion plot`` draws."""
        write_records(self.records, path)

    def plot(self, path: str | Path, **options: Any) -> Path:
        """Draws the records by :func:`plot_training`."""
        return plot_training(self.records, path, **options)


class _Means(LayerSums):
    """Means of each text's pairs in one layer, on its device, and nothing else of :class:`LayerSums`."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Tensor] = []

    def add(self, z: Tensor, texts: Texts) -> None:
        order = texts.order.to(z.device)
        for begin, end in zip(texts.begins.tolist(), texts.ends.tolist(), strict=True):
            self.values.append(mean_pairwise_cosine(z[order[begin:end]]))


class _WholeModel(MeasuredModel):
    """Model that is called as a whole, as sharded parameters and accelerate's autocast need it, with the logits of one
    token where it can."""

    def __init__(self, model: nn.Module, stack: str | None) -> None:
        super().__init__(model, stack)
        self.called = model
        described = next((module for module in model.modules() if is_pretrained(module)), model)
        self.names = list(inspect.signature(type(described).forward).parameters)

    def __call__(self, inputs: dict[str, Tensor] | Tensor) -> None:
        if isinstance(inputs, dict) and "logits_to_keep" in self.names:
            inputs = {**inputs, "logits_to_keep": torch.zeros(1, dtype=torch.int64)}  # of token 0
        super().__call__(inputs)
