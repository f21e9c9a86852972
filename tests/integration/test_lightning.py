"""The dispersion loss in Lightning: each gradient that the optimiser takes is the sum by hand in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from regularized import WEIGHT, Model, Step, assert_same, by_hand, gradients, tokens
from torch import Tensor, nn

pytestmark = pytest.mark.integrations
lightning = pytest.importorskip("lightning.pytorch", reason="needs lightning")
Dispersion = pytest.importorskip("dispersion_kernels.integrations.lightning").Dispersion


class Module(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self, returns: str = "tensor") -> None:
        super().__init__()
        self.net = Model()
        self.returns = returns
        self.steps: list[dict[str, Tensor]] = []
        self.evaluated: list[Tensor] = []

    def training_step(self, batch: Tensor) -> Any:
        loss = self.net(batch)
        return {"loss": loss, "more": 1} if self.returns == "dict" else loss

    def validation_step(self, batch: Tensor) -> None:
        self.evaluated.append(self.net(batch))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        # Unscaled here under 16-mixed, too.
        self.steps.append(gradients(self.net))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(folder: Path, module: Module, batch_size: int, layers: Any = "all", **options: Any) -> Any:
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[Dispersion(layers, WEIGHT)],
        **options,
    )
    rows = tokens(batch=4)
    loader = torch.utils.data.DataLoader(rows, batch_size=batch_size)  # type: ignore[arg-type]
    trainer.fit(module, loader, loader)
    return trainer


def blocks(model: nn.Module) -> Any:
    return list(model.blocks)  # type: ignore[arg-type]


@pytest.mark.parametrize("returns", ["tensor", "dict"])
@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 1), (2, 2), (1, 4)])
def test_accumulation_changes_nothing(batch_size: int, accumulate: int, returns: str, tmp_path: Path) -> None:
    module = Module(returns)
    before = copy.deepcopy(module.net)
    trainer = fit(tmp_path, module, batch_size, accumulate_grad_batches=accumulate)
    exact = by_hand(before, [lambda m: m(tokens(batch=4))], blocks)
    (grads,) = module.steps
    assert_same(Step(exact.loss, grads), exact)
    logged = trainer.logged_metrics
    if accumulate == 1:
        total = logged["cross_entropy"] + WEIGHT * logged["dispersion"]
        torch.testing.assert_close(total.double(), exact.loss, rtol=1e-5, atol=1e-5)
    # Validation has no term in it, and nothing is left on the module.
    torch.testing.assert_close(
        torch.stack(module.evaluated[-4 // batch_size :]).mean(), before(tokens(batch=4)).detach()
    )
    assert "training_step" not in vars(module)
    assert not any(m._forward_hooks for m in module.modules())


def test_modules_of_a_model_that_training_step_calls(tmp_path: Path) -> None:
    module = Module()
    fit(tmp_path, module, 4, layers=[module.net.blocks[0], module.net.blocks[2]])
    exact = by_hand(Model(), [lambda m: m(tokens(batch=4))], lambda m: [blocks(m)[0], blocks(m)[2]])
    (grads,) = module.steps
    assert_same(Step(exact.loss, grads), exact)


def test_bf16_mixed(tmp_path: Path) -> None:
    module = Module()
    fit(tmp_path, module, 2, accumulate_grad_batches=2, precision="bf16-mixed")
    exact = by_hand(Model(), [lambda m: m(tokens(batch=4))], blocks)
    (grads,) = module.steps
    assert_same(Step(exact.loss, grads), exact, tolerance=2e-2)


def test_16_mixed_scales_the_term(tmp_path: Path) -> None:
    """Lightning has no fp16 on a CPU: the plugin of its GradScaler, on one."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    module = Module()
    fit(tmp_path, module, 2, accumulate_grad_batches=2, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    exact = by_hand(Model(), [lambda m: m(tokens(batch=4))], blocks)
    (grads,) = module.steps
    assert scaler.get_scale() == 2.0**12
    assert_same(Step(exact.loss, grads), exact, tolerance=2e-2)


def test_manual_optimisation_is_refused(tmp_path: Path) -> None:
    module = Module()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="automatic_optimization=False"):
        fit(tmp_path, module, 2)
