"""Arguments of a wrong type: an error that names the argument, what it got and the remedy, of every public function."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dispersion_kernels import (
    AngularSpread,
    DispersionLoss,
    DispersiveL2,
    L2Repel,
    Orthogonalization,
    PerplexityEntropy,
    SampledPairs,
    SampledTokens,
    Uniformity,
    fused_dispersion_loss,
    supported,
)
from dispersion_kernels.condensation import condensation_by_layer, mean_pairwise_cosine, plot_condensation

F: Callable[..., Any] = fused_dispersion_loss
PUBLISHED: Callable[..., Any] = DispersionLoss.from_published
Z = torch.randn(2, 6, 8)
PACKED = torch.randn(10, 8)
TRUE = torch.ones(2, 6, dtype=torch.bool)


class ModelOutput(OrderedDict[str, Any]):
    """As Hugging Face's: a mapping with attributes."""

    hidden_states = (Z, Z)


def of(function: Any, *args: Any, **options: Any) -> Callable[[], Any]:
    return lambda: function(*args, **options)


CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no hidden states": (of(F, None), TypeError, "z must be a tensor or a list.*got None.*output_hidden_states=True"),
    "a model's output": (of(F, ModelOutput()), TypeError, r"z must.*ModelOutput.*z=output.hidden_states\[1:-1\]"),
    "a dictionary": (of(F, {"hidden_states": [Z]}), TypeError, r"z must.*got dict.*z=output.hidden_states\[1:-1\]"),
    "a dictionary of layers": (of(F, {"a": Z}), TypeError, r"z must.*got dict.*list\(tensors.values\(\)\)"),
    "an array": (of(F, Z.numpy()), TypeError, r"z must.*got numpy.ndarray; give torch.from_numpy\(z\)"),
    "arrays": (of(F, [Z, Z.numpy()]), TypeError, r"z\[1\] is numpy.ndarray; give torch.from_numpy\(z\[1\]\)"),
    "lists": (of(F, Z.tolist()), TypeError, r"z\[0\] is list; stack"),
    "a string": (of(F, "hidden"), TypeError, "z must.*got str"),
    "a number": (of(F, 3), TypeError, "z must.*got int"),
    "a module": (of(F, torch.nn.Linear(2, 2)), TypeError, "z must.*got torch.nn.modules.linear.Linear"),
    "a layer of None": (of(F, [Z, None]), TypeError, r"z\[1\] is None"),
    "an integer z": (of(F, Z.long()), TypeError, r"z must be float64.*got torch.int64; convert it: z.float\(\)"),
    "a complex z": (of(F, Z.cfloat()), TypeError, "z must be float64.*got torch.complex64"),
    "z of one dimension": (of(F, Z[0, 0]), ValueError, r"z must be \[B, L, F\].*got shape \(8,\)"),
    "a float mask": (of(F, Z, mask=TRUE.float()), TypeError, "mask must be boolean.*got torch.float32.*mask == 0"),
    "an integer mask": (of(F, Z, mask=2 * TRUE.int()), TypeError, r"mask must.*got torch.int32.*mask.bool\(\)"),
    "a list as mask": (of(F, Z, mask=TRUE.tolist()), TypeError, r"mask must be a tensor.*got list.*torch.as_tensor"),
    "an array as mask": (of(F, Z, mask=TRUE.numpy()), TypeError, "mask must be a tensor.*got numpy.ndarray"),
    "a list of ids": (of(F, Z, document_ids=[[0] * 6] * 2), TypeError, "document_ids must be a tensor.*got list"),
    "a mask as ids": (of(F, Z, document_ids=TRUE), TypeError, "document_ids must be integers, got torch.bool.*mask"),
    "a list of bounds": (of(F, PACKED, cu_seqlens=[0, 4, 10]), TypeError, "cu_seqlens must.*got list.*torch.tensor"),
    "an array of bounds": (of(F, PACKED, cu_seqlens=np.array([0, 10])), TypeError, "cu_seqlens must.*numpy.ndarray"),
    "bounds of int16": (of(F, PACKED, cu_seqlens=torch.tensor([0, 10]).short()), TypeError, "cu_seqlens must be int32"),
    "tau of NaN": (of(F, Z, tau=math.nan), ValueError, "tau must be a finite number > 0.*got nan"),
    "tau of a string": (of(F, Z, tau="1"), TypeError, "tau must be a number, got '1'"),
    "tau of a list": (of(F, Z, tau=[1.0]), TypeError, r"tau must be a number, got \[1.0\]"),
    "a complex tau": (of(F, Z, tau=1j), TypeError, "tau must be a number, got 1j"),
    "clamp": (of(F, Z, clamp=0.1), TypeError, "unexpected keyword argument 'clamp'"),
    "eps": (of(F, Z, eps=0.1), TypeError, "unexpected keyword argument 'eps'"),
    "clamp of a string": (of(AngularSpread, clamp="a"), TypeError, "clamp must be a number, got 'a'"),
    "eps of a string": (of(L2Repel, eps="a"), TypeError, "eps must be a number, got 'a'"),
    "a count of a string": (of(SampledTokens, "256"), ValueError, "count must be an integer.*got '256'"),
    "sampling of a string": (of(F, Z, sampling="0.1"), TypeError, "sampling must be None.*got .0.1.; try"),
    "sampling of NaN": (of(F, Z, sampling=math.nan), ValueError, "fraction must be from 0 to 1, got nan"),
    "no control variate": (of(SampledPairs, 0.1, None), ValueError, "unknown control_variate None"),
    "a seed": (of(F, Z, generator=3), TypeError, r"generator must be a torch.Generator.*got 3.*seed"),
    "no reduction": (of(F, Z, reduction=None), ValueError, "unknown reduction None"),
    "a list as impl": (of(F, Z, impl=[]), ValueError, r"unknown impl \[\]"),
    "recompute of a string": (of(F, Z, recompute="no"), TypeError, "recompute must be True or False, got 'no'"),
    "return_stats of a string": (of(F, Z, return_stats="no"), TypeError, "return_stats must be True or False"),
    "no potential": (of(F, Z, None), TypeError, "potential must be a name or a Potential, got NoneType"),
    "a potential's class": (of(F, Z, AngularSpread), TypeError, r"potential must.*give an instance: AngularSpread\(\)"),
    "a function": (of(F, Z, abs), TypeError, "potential must be a name or a Potential"),
    "a layer on meta": (of(F, [Z, Z.to("meta")]), ValueError, "z has layers on cpu and on meta.*materialise"),
    "an array as impl": (of(F, Z, impl=np.ones(2)), ValueError, "unknown impl"),
    "an array as reduction": (of(F, Z, reduction=np.ones(2)), ValueError, "unknown reduction"),
    "an array as potential": (of(DispersionLoss, np.ones(2)), TypeError, "potential must be a name.*got ndarray"),
    "an array as variant": (of(PUBLISHED, np.ones(2)), ValueError, "unknown variant"),
    "an unknown variant": (of(PUBLISHED, "uniformity"), ValueError, "unknown variant 'uniformity'; available: ang"),
    "eps beyond int64": (of(L2Repel, eps=2**80), ValueError, r"eps must be a float or an integer of 64 bits.*give 1.2"),
    "an array as clamp": (of(AngularSpread, clamp=np.ones((2, 0))), TypeError, "clamp must be a number, got array"),
    "clamp on meta": (of(AngularSpread, clamp=torch.ones((), device="meta")), TypeError, "clamp must be a number"),
    "supported without z": (of(supported, "cpu", None), TypeError, "z must be a tensor, hidden states, got None"),
    "supported with layers": (of(supported, "cpu", [Z]), TypeError, r"z must be a tensor.*got list.*layers\[0\]"),
    "supported with a number": (of(supported, 3, Z), ValueError, "unknown impl 3"),
    "AngularSpread": (of(AngularSpread, tau="a"), TypeError, "tau must be a number, got 'a'"),
    "AngularSpread of None": (of(AngularSpread, eps=None), TypeError, "eps must be a number, got None"),
    "tau on meta": (of(F, Z, tau=torch.ones((), device="meta")), ValueError, "tau is a tensor on meta"),
    "tau with pairs": (of(F, Z, tau=torch.tensor(0.5), sampling=1 / 16), TypeError, "a number with Sampled"),
    "tau of the reference": (of(F, Z, tau=torch.tensor(-1.0), impl="reference"), ValueError, "tau must be"),
    "AngularSpread of two": (of(AngularSpread, torch.ones(2)), TypeError, "or a floating tensor of one, got tensor"),
    "Orthogonalization": (of(Orthogonalization, margin="a"), TypeError, "margin must be a number, got 'a'"),
    "L2Repel": (of(L2Repel, norm_weight="a"), TypeError, "norm_weight must be a number, got 'a'"),
    "L2Repel of a string": (of(L2Repel, include_diagonal="no"), TypeError, "include_diagonal must be True or False"),
    "DispersiveL2": (of(DispersiveL2, include_diagonal=3), TypeError, "include_diagonal must be True or False, got 3"),
    "PerplexityEntropy": (of(PerplexityEntropy, eps="a"), TypeError, "eps must be a number, got 'a'"),
    "Uniformity": (of(Uniformity, "a"), TypeError, "t must be a number, got 'a'"),
    "DispersionLoss": (of(DispersionLoss, tau="a"), TypeError, "tau must be a number, got 'a'"),
    "DispersionLoss, published": (of(PUBLISHED, tau_cos="a"), TypeError, "tau must be a number, got 'a'"),
    "DispersionLoss, no potential": (of(DispersionLoss, None), TypeError, "potential must be a name"),
    "DispersionLoss, tau for none": (of(DispersionLoss, "decorrelation", tau=1.0), ValueError, "tau=1.0 was given"),
    "DispersionLoss, tau_cos": (of(DispersionLoss, tau_cos=1.0), TypeError, "unexpected keyword argument 'tau_cos'"),
    "DispersionLoss, clamp": (of(DispersionLoss, clamp=0.1), TypeError, "unexpected keyword argument 'clamp'"),
    "DispersionLoss, stats": (of(DispersionLoss(), Z, return_stats=1), TypeError, "return_stats must be True or False"),
    "DispersionLoss, sampling": (of(DispersionLoss, sampling="a"), TypeError, "sampling must be None"),
    "DispersionLoss, recompute": (of(DispersionLoss, recompute="a"), TypeError, "recompute must be True or False"),
    "DispersionLoss of None": (of(DispersionLoss(), None), TypeError, "z must be a tensor or a list.*got None"),
    "cosines of a tensor": (of(condensation_by_layer, Z), TypeError, r"hidden must be a list.*\[hidden\].*unbind\(\)"),
    "cosines of None": (of(condensation_by_layer, None), TypeError, "hidden must.*got None"),
    "cosines of nothing": (of(condensation_by_layer, []), ValueError, "hidden is an empty list"),
    "cosines of arrays": (of(condensation_by_layer, [Z.numpy()]), TypeError, r"hidden\[0\] is numpy.ndarray"),
    "cosine of None": (of(mean_pairwise_cosine, None), TypeError, "z must be a tensor.*got None"),
    "cosine of a list": (of(mean_pairwise_cosine, [Z]), TypeError, "z must be a tensor.*condensation_by_layer"),
    "cosine of integers": (of(mean_pairwise_cosine, Z.long()), ValueError, "z must be floating point.*torch.int64"),
    "cosine of sparse z": (of(mean_pairwise_cosine, Z.to_sparse()), TypeError, "z must be a dense tensor"),
    "cosine of no feature": (of(mean_pairwise_cosine, Z[:, :, :0]), ValueError, r"z must be.*\[2, 6, 0\]"),
    "cosine, a list as mask": (of(mean_pairwise_cosine, Z, mask=TRUE.tolist()), TypeError, "mask must be a tensor"),
    "cosine, mask on meta": (of(mean_pairwise_cosine, Z, mask=TRUE.to("meta")), ValueError, "mask is on meta"),
    "a plot of a list": (of(plot_condensation, [1.0], "x.png"), TypeError, r"curves must map labels.*got \[1.0\]"),
    "a plot of a number": (of(plot_condensation, {"a": 1.0}, "x.png"), TypeError, r"curves\['a'\] must be numbers"),
    "a plot of a string": (of(plot_condensation, {"a": "b"}, "x.png"), TypeError, r"curves\['a'\] must be numbers"),
    "a plot to a number": (of(plot_condensation, {"a": [1.0]}, 3), TypeError, "path must be a string or a path, got 3"),
    "a plot to text": (of(plot_condensation, {"a": [1.0]}, "x.doc"), ValueError, "path ends in .doc.*available: .*png"),
    "a dashed string": (of(plot_condensation, {"a": [1.0]}, "x.png", dashed="a"), TypeError, "dashed must be a list"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), CASES.values(), ids=CASES.keys())
def test_the_error_names_the_argument(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
    assert not Path("x.doc").exists()


def test_what_is_plain_works() -> None:
    """A generator, a tuple, numbers of NumPy and tensors of one number."""
    expected = fused_dispersion_loss([Z, Z], tau=0.5)
    assert torch.equal(F((z for z in (Z, Z)), tau=0.5), expected)
    assert torch.equal(F((Z, Z), tau=np.float32(0.5)), expected)
    assert torch.equal(condensation_by_layer((Z, Z)), mean_pairwise_cosine(Z).expand(2))


def test_the_cosine_of_no_sequence_is_nan() -> None:
    assert mean_pairwise_cosine(Z[:0]).isnan()
    assert mean_pairwise_cosine(Z[:0].to("meta")).shape == ()  # as on an accelerator, where no value is read


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_tracing_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"torch.jit.trace.*impl='auto'.*torch.compile or torch.export"):
        torch.jit.trace(DispersionLoss(), (Z,))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "sampled", [{}, {"sampling": SampledTokens(4)}, {"sampling": 1 / 16, "return_stats": True}], ids=str
)
def test_layers_on_two_devices(sampled: dict[str, Any], reduction: str) -> None:
    """Each layer's loss is computed where the layer is, and averaged where the first is; masks are moved."""
    # Without gradients, for which PyTorch needs the device itself.
    with FakeTensorMode(), torch.no_grad():
        layers = [torch.empty(2, 700, 8, device=device) for device in ("cpu", "cuda:1", "cpu")]
        mask, ids = torch.ones(2, 700, dtype=torch.bool), torch.zeros(2, 700, dtype=torch.int64)
        options: list[dict[str, Any]] = [{}, {"mask": mask}, {"document_ids": ids}]
        for given in options:
            for z in (layers, layers[1:] + layers[:1]):
                moved = {name: value.to(z[0].device) for name, value in given.items()}
                loss = F(z, reduction=reduction, **moved, **sampled)
                if "return_stats" in sampled:
                    loss, stats = loss
                    assert (stats.relative_error.shape, stats.relative_error.device) == ((3,), z[0].device)
                assert (loss.shape, loss.device) == (() if reduction == "mean" else (2,), z[0].device)
        packed = [layer.flatten(0, 1) for layer in layers]
        assert F(packed, cu_seqlens=torch.zeros(4, dtype=torch.int32)).device.type == "cpu"
        with pytest.raises(ValueError, match="mask is on cuda:0; it must be on cpu, with z"):
            F(layers, mask=mask.to("cuda:0"))
