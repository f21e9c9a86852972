"""Callback that adds the dispersion loss in Lightning's ``Trainer``::

    trainer = Trainer(callbacks=[Dispersion(layers="all", weight=0.1)])
    trainer.fit(module)

Modules with manual optimisation are not supported.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from dispersion_kernels.blocks import find_stack
from dispersion_kernels.condensation.monitor import CondensationMonitor
from dispersion_kernels.regularizer import DispersionRegularizer


class Dispersion(Callback):
    """Callback that adds the dispersion loss to the loss that ``training_step`` returns. Lightning divides and scales
    the sum as any loss. It logs ``dispersion``, the mean over the chosen layers without the weight, and
    ``cross_entropy``, the module's own loss.

    Args:
        layers, weight, options: as in :class:`~dispersion_kernels.DispersionRegularizer`.
    """

    def __init__(self, layers: Any = "all", weight: float = 0.1, **options: Any) -> None:
        self.arguments: dict[str, Any] = {"layers": layers, "weight": weight, **options}
        self.regularizer: DispersionRegularizer | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(pl_module).__name__} optimises by itself (automatic_optimization=False), so that there is no "
                "loss for the callback to add to; make a DispersionRegularizer, and add its loss() in training_step"
            )
        regularizer = self.regularizer = DispersionRegularizer(pl_module, **self.arguments)
        step = pl_module.training_step

        @functools.wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            if result is None:  # Lightning skips this batch
                return None
            own = result["loss"] if isinstance(result, Mapping) else result
            term = regularizer.loss()
            values = list(regularizer.values.values())
            pl_module.log("dispersion", torch.stack([value.to(own.device) for value in values]).mean())
            pl_module.log("cross_entropy", own.detach())
            loss = own + term.to(own.device)
            return {**result, "loss": loss} if isinstance(result, Mapping) else loss

        pl_module.training_step = training_step

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.regularizer is not None:
            self.regularizer.remove()
            self.regularizer = None
            del pl_module.training_step


class Condensation(Callback):
    """Callback that measures condensation while a module trains: before the first step, every ``every`` steps, at which
    it logs ``condensation/block 1`` and so on, and ``condensation/mean``, and after the last one. The records and their
    picture are in the attribute ``monitor``.

    A module without a ``forward`` is measured by its child that has the blocks.

    Args:
        texts, tokenizer, options: as in :class:`~dispersion_kernels.condensation.CondensationMonitor`.
    """

    def __init__(self, texts: Iterable[Any], tokenizer: Any = None, **options: Any) -> None:
        self.arguments: dict[str, Any] = {"texts": texts, "tokenizer": tokenizer, **options}
        self.monitor: CondensationMonitor | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = _called(pl_module, self.arguments.get("stack"))
        self.monitor = CondensationMonitor(model, **self.arguments)
        self._measure(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.monitor:
            with trainer.precision_plugin.forward_context():
                scalars = self.monitor(trainer.global_step)  # empty between measurements
            if scalars:
                pl_module.log_dict(scalars)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.monitor and self.monitor.records[-1].step != trainer.global_step:
            self._measure(trainer)

    def _measure(self, trainer: Trainer) -> None:
        if self.monitor:
            with trainer.precision_plugin.forward_context():
                self.monitor.measure(trainer.global_step)


def _called(module: nn.Module, stack: str | None) -> nn.Module:
    """``module``, or its child with the stack of blocks where ``module`` has no forward of its own."""
    if type(module).forward is not LightningModule.forward:
        return module
    return module.get_submodule(find_stack(module, stack).name.split(".")[0])
