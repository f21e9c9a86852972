"""Dispersion loss in Hugging Face's ``Trainer`` and its subclasses, as TRL's and Sentence Transformers'::

    trainer = SFTTrainer(model, train_dataset=dataset)
    attach(trainer, layers="all", weight=0.1)
    trainer.train()

or, in a class, ``class MyTrainer(DispersionMixin, SFTTrainer)`` with ``dispersion={"weight": 0.1}`` among the arguments
of its constructor.

A step of N accumulated batches adds ``weight`` times the mean of the batches' dispersion, on any number of processes,
whether the trainer divides the loss by N or the model divides its loss by the step's number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from dispersion_kernels.condensation.monitor import CondensationMonitor
from dispersion_kernels.regularizer import DispersionRegularizer


def attach(trainer: Any, layers: Any = "all", weight: float = 0.1, **options: Any) -> DispersionRegularizer:
    """Adds the dispersion loss to the loss and the logs of ``trainer``.

    Args:
        trainer: ``transformers.Trainer``, or an instance of a subclass, before ``train()``.
        layers, weight, options: as in :class:`~dispersion_kernels.DispersionRegularizer`.

    Returns:
        The regulariser, which is also ``trainer.dispersion``.

    Raises:
        ValueError: the trainer has one already, or a wrong layer or option.
        TypeError: no ``Trainer``, or a wrong type.
    """
    if isinstance(trainer, DispersionMixin):
        raise ValueError("trainer has a dispersion loss already: trainer.dispersion; change its weight there")
    _check_trainer(trainer, "add DispersionRegularizer(model).loss() to the loss")
    regularizer = DispersionRegularizer(trainer.model, layers, weight, **options)
    _mix_in(trainer, DispersionMixin)
    trainer._start(regularizer)
    return regularizer


def attach_monitor(trainer: Any, texts: Iterable[Any], tokenizer: Any = None, **options: Any) -> CondensationMonitor:
    """Measures condensation while ``trainer`` trains, and adds it to the logs of the steps at which it is measured:
    ``condensation/block 1`` and so on, and ``condensation/mean``.

    Measured before the first step, every ``every`` steps, at which the trainer then logs, and after the last one.

    Args:
        trainer: ``transformers.Trainer``, or an instance of a subclass, before ``train()``.
        texts, options: as in :class:`~dispersion_kernels.condensation.CondensationMonitor`.
        tokenizer: tokenizer for strings; default: the trainer's.

    Returns:
        The monitor, which is also ``trainer.condensation``; after training, ``monitor.plot(path)`` draws its records.

    Raises:
        ValueError: the trainer has one already, an option is wrong, or no text has two tokens.
        TypeError: no ``Trainer``, or a wrong type.
    """
    _check_trainer(trainer, "call CondensationMonitor(model, texts)(step)")
    if isinstance(trainer, _LogsCondensation):
        raise ValueError("trainer has a monitor already: trainer.condensation")
    tokenizer = tokenizer or getattr(trainer, "processing_class", None)
    monitor = CondensationMonitor(trainer.model, texts, tokenizer, **options)
    _mix_in(trainer, _LogsCondensation)
    trainer.condensation = monitor
    trainer.add_callback(_Measuring(monitor))
    return monitor


def _check_trainer(trainer: Any, instead: str) -> None:
    if not callable(getattr(trainer, "compute_loss", None)) or not hasattr(trainer, "accelerator"):
        raise TypeError(
            f"trainer must be a transformers.Trainer, or of a class made of it, got {type(trainer).__name__}; in a "
            f"loop of your own {instead}"
        )


def _mix_in(trainer: Any, mixin: type) -> None:
    """Puts ``mixin`` before the class of ``trainer``."""
    kind = type(trainer)
    trainer.__class__ = type(kind.__name__, (mixin, kind), {"__module__": kind.__module__})


class DispersionMixin:
    """Mixin to put before a ``Trainer`` among the base classes. The keyword argument ``dispersion`` of the constructor
    maps to the arguments of :class:`~dispersion_kernels.DispersionRegularizer` after the model.

    Training logs have ``dispersion``, the mean over the chosen layers without the weight, and ``cross_entropy``, the
    trainer's own loss; ``loss`` is ``cross_entropy`` plus ``weight`` times ``dispersion``.
    """

    dispersion: DispersionRegularizer

    def __init__(self, *args: Any, dispersion: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model: Any = self.model  # type: ignore[attr-defined]
        self._start(DispersionRegularizer(model, **(dispersion or {})))

    def _start(self, regularizer: DispersionRegularizer) -> None:
        self.dispersion = regularizer
        self._sums: Tensor | None = None
        self._summed_from: int = self.state.global_step  # type: ignore[attr-defined]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        parent: Any = super()
        result = parent.compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **kwargs
        )
        if not (model.training and torch.is_grad_enabled()):
            return result
        own, outputs = result if return_outputs else (result, None)
        # Where the trainer does not divide the loss by the step's batches, the parent's loss is already a share of the
        # step's loss.
        steps: int = self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
        scaled = self._is_scaled(num_items_in_batch)
        term = self.dispersion.loss().to(own.device)
        loss = own + (term / steps if scaled else term)
        values = torch.stack([value.to(own.device) for value in self.dispersion.values.values()])
        share = torch.stack([values.mean() / steps, own.detach().to(values.dtype) / (1 if scaled else steps)])
        self._sums = share if self._sums is None else self._sums + share
        return (loss, outputs) if return_outputs else loss

    def _is_scaled(self, num_items_in_batch: Any) -> bool:
        """Whether ``training_step`` takes the loss as it is, without division by the batches of a step. The condition
        is that of ``training_step`` itself."""
        trainer: Any = self
        if getattr(trainer, "loss_is_scaled_for_ga", None) is not None:
            return bool(trainer.loss_is_scaled_for_ga)
        by_model = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(by_model or trainer.compute_loss_func is not None)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        parent: Any = super()
        trainer: Any = self
        steps = trainer.state.global_step - self._summed_from
        if "loss" in logs and self._sums is not None and steps > 0:
            sums = trainer.accelerator.gather(self._sums[None]).mean(0) / steps
            logs["dispersion"], logs["cross_entropy"] = sums.tolist()
            self._sums, self._summed_from = None, trainer.state.global_step
        parent.log(logs, *args, **kwargs)


class _Measuring(TrainerCallback):
    def __init__(self, monitor: CondensationMonitor) -> None:
        self.monitor = monitor

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.monitor.measure(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = state.global_step >= state.max_steps
        if last or state.global_step % self.monitor.every == 0:
            self.monitor.measure(state.global_step)
            control.should_log = True


class _LogsCondensation:
    """Mixin whose training logs have the scalars of a monitor that measured at that step."""

    condensation: CondensationMonitor

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        parent: Any = super()
        trainer: Any = self
        if "loss" in logs and self.condensation.records[-1].step == trainer.state.global_step:
            logs.update(self.condensation.scalars())
        parent.log(logs, *args, **kwargs)
