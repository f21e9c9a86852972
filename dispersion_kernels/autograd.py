"""The operator that torch.compile and torch.library see, and the autograd.Function over it.

Forward computes the loss of each sequence and, where a gradient will be wanted, all of that but a factor a token, in
fp32 (fp64 for fp64). Backward multiplies by that factor and the upstream gradient at once, and rounds, once, to the
dtype of the tokens: what a GradScaler multiplies in is there before an fp16 gradient could underflow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dispersion_kernels import native
from dispersion_kernels.backends import choose
from dispersion_kernels.potentials import Potential
from dispersion_kernels.segments import check_cu_seqlens, host_segments, segment_of_token
from dispersion_kernels.sweep import Result, accumulation_dtype, in_blocks, sweep


def sequence_losses(
    z: Tensor,
    groups: Tensor | None,
    cu_seqlens: Tensor | None,
    potential: Potential,
    impl: str,
    recompute: bool,
) -> tuple[Tensor, Tensor]:
    """The loss ``[S]`` of each sequence, differentiable once, and the number of its ordered pairs ``[S]``."""
    name, params = potential.name(), potential.params()
    if torch.is_grad_enabled() and z.requires_grad:
        loss, pairs = _Dispersion.apply(z, groups, cu_seqlens, name, params, impl, recompute)
        return loss, pairs
    loss, pairs, *_ = torch.ops.dispersion_kernels.forward(z, groups, cu_seqlens, name, params, impl, False)
    return loss, pairs


class _Dispersion(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        groups: Tensor | None,
        cu_seqlens: Tensor | None,
        name: str,
        params: list[float],
        impl: str,
        recompute: bool,
    ) -> tuple[Tensor, Tensor]:
        args = (name, params, impl)
        loss, pairs, *grad = torch.ops.dispersion_kernels.forward(z, groups, cu_seqlens, *args, not recompute)
        ctx.mark_non_differentiable(pairs)
        ctx.save_for_backward(*((z, groups) if recompute else grad), cu_seqlens)
        ctx.args, ctx.recompute, ctx.dtype = args, recompute, z.dtype
        return loss, pairs

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        # With create_graph what this returns would count as a constant, and a gradient penalty silently do nothing.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "fused_dispersion_loss was differentiated with create_graph=True, for a second derivative, which it "
                'does not have. Use impl="reference", which materialises the L x L matrices and has one'
            )
        *saved, cu_seqlens = ctx.saved_tensors
        if ctx.recompute:
            _, _, *saved = torch.ops.dispersion_kernels.forward(*saved, cu_seqlens, *ctx.args, True)
        grad, scale = saved
        if cu_seqlens is None:
            factor = scale * upstream[0].unsqueeze(1)
        else:
            factor = scale * upstream[0][segment_of_token(cu_seqlens.to(grad.device), grad.shape[1])]
        return _scaled(grad, factor.unsqueeze(2), ctx.dtype), None, None, None, None, None, None


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad * factor``, rounded once, to ``dtype``."""
    if dtype == grad.dtype:
        return grad * factor
    if torch.compiler.is_compiling():
        return (grad * factor).to(dtype)  # which the compiler fuses
    dz = torch.empty_like(grad, dtype=dtype)
    if grad.device.type != "cpu":
        return torch.mul(grad, factor, out=dz)
    # In blocks that stay in the cache: PyTorch's CPU kernels write all of the product in fp32 before they narrow it.
    for rounded, g, f in in_blocks(dz, grad, factor):
        rounded.copy_(g * f)
    return dz


_library = torch.library.Library("dispersion_kernels", "FRAGMENT")
_library.define(
    "forward(Tensor z, Tensor? groups, Tensor? cu_seqlens, str potential, float[] params, str impl, bool with_grad)"
    " -> (Tensor loss, Tensor pairs, Tensor grad, Tensor scale)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(_library, "forward", "CompositeExplicitAutograd")
def _forward(
    z: Tensor,
    groups: Tensor | None,
    cu_seqlens: Tensor | None,
    potential: str,
    params: list[float],
    impl: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, z.shape[1])
    if choose(impl, z, potential) == "cpu":
        loss, pairs, grad, scale = _native_sweep(z, potential, params, groups, cu_seqlens, with_grad)
    else:
        # The sweep's products are fp32 inside an autocast region, too.
        with torch.autocast(z.device.type, enabled=False):
            chosen = Potential.from_params(potential, params)
            loss, pairs, grad, scale = sweep(z, chosen, groups, cu_seqlens, with_grad)
    if grad is None or scale is None:
        return loss, pairs, loss.new_empty(0), loss.new_empty(0)
    return loss, pairs, grad, scale


def _native_sweep(
    z: Tensor,
    potential: str,
    params: list[float],
    groups: Tensor | None,
    cu_seqlens: Tensor | None,
    with_grad: bool,
) -> Result:
    """The sweep in the CPU kernel: as :func:`dispersion_kernels.sweep.sweep`."""
    batch, length, features = z.shape
    runs = host_segments(batch, length, groups, None if cu_seqlens is None else cu_seqlens.cpu())
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    tokens = z.reshape(batch * length, features)
    named = dict(zip(native.PARAMETERS[potential], params, strict=True))
    loss, grad, scale = native.dispersion(
        tokens if features == 1 or tokens.stride(1) == 1 else tokens.contiguous(),
        potential_name=potential,
        params=named,
        index=runs.rows,
        begins=runs.begins,
        ends=runs.ends,
        sequence=runs.sequence,
        num_sequences=sequences,
        need_grad=with_grad,
    )
    with_itself = int(named.get("include_diagonal", 0))
    if groups is None and cu_seqlens is None:
        pairs = torch.full(
            (batch,), length * (length - 1 + with_itself) if length > 1 else 0, dtype=torch.int64, device="cpu"
        )
    else:
        lengths = runs.ends - runs.begins
        of_runs = (lengths * (lengths - 1 + with_itself)).masked_fill_(lengths < 2, 0)
        pairs = torch.zeros(sequences, dtype=torch.int64, device="cpu")
        pairs.index_add_(0, runs.sequence, of_runs)
    if grad is None or scale is None:
        return Result(loss.float(), pairs, None, None)
    return Result(loss.float(), pairs, grad.view(z.shape), scale.view(batch, length))


@torch.library.register_fake("dispersion_kernels::forward")
def _forward_fake(
    z: Tensor,
    groups: Tensor | None,
    cu_seqlens: Tensor | None,
    potential: str,
    params: list[float],
    impl: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sequences = z.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = accumulation_dtype(z.dtype)
    loss = z.new_empty(sequences, dtype=dtype)
    grad = z.new_empty(z.shape if with_grad else 0, dtype=dtype)
    scale = z.new_empty(z.shape[:2] if with_grad else 0, dtype=dtype)
    return loss, z.new_empty(sequences, dtype=torch.int64), grad, scale
