"""Callback that adds the dispersion loss in Lightning's ``Trainer``::

    trainer = Trainer(callbacks=[Dispersion(layers="all", weight=0.1)])
    trainer.fit(module)

Modules with manual optimisation are not supported.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

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
