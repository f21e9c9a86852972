"""Options to estimate the loss from a fraction of the pairs or of the tokens; docs/sampling.md has the mathematics."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Literal, get_args

ControlVariate = Literal["low_rank", "full_rank", "none"]


@dataclass(frozen=True)
class SampledPairs:
    """Value of ``sampling`` for a fraction of the pairs, spread evenly over all tokens.

    The tokens of each sequence (of each document in it) are cut into random blocks of ``fraction * L`` tokens, at least
    16 (L of packed sequences: their mean length), and only pairs within blocks are evaluated: 3 ``fraction`` B L^2 F
    FLOPs for loss and gradient. A model h of the slope, the control variate, stands for the other pairs. For a token i
    of N, and the m other tokens S_i of its block, each of which is in S_i with probability p::

        G_i = sum_{j != i} h_ij x_j + 1/p sum_{j in S_i} (slope(c_ij) - h_ij) x_j
        Var G_i = (N - 1)^2 / m (1 - m / (N - 1)) Var_j((slope(c_ij) - h_ij) x_j)

    G_i is an unbiased estimate of ``sum_{j != i} slope(c_ij) x_j``; the mean of psi has an analogous estimate. The
    logarithm and quotient of a log-mean potential have a bias of about one part in the number of evaluated pairs.

    Args:
        fraction: fraction of the pairs, from 0 to 1 inclusive. 1 evaluates all pairs. 0 takes the model alone, in time
            linear in L, for whole sequences; the bias of the low-rank model is 0.7 to 1.9% of the gradient on hidden
            states of GPT-2 and SmolLM2 at tau = 1, and 3 to 14% at tau = 0.1. GPU kernels evaluate all pairs up to the
            length at which an estimate should be faster (docs/sampling.md).
        control_variate: ``"low_rank"``: parabola in an estimate of c from 16 directions near the tokens' principal
            directions, in 64 B L F FLOPs. ``"full_rank"``: parabola in c itself, for whole sequences of tokens that are
            alike in all directions, in 4 to 8 B L F^2 FLOPs. ``"none"``: no model, for a fraction above 0.

    Raises:
        TypeError: ``fraction`` is no number.
        ValueError: ``fraction`` out of range, an unknown ``control_variate``, or neither pairs nor a model.

    Example::

        fused_dispersion_loss(z, sampling=SampledPairs(1 / 16, control_variate="low_rank"))
    """

    fraction: float
    control_variate: ControlVariate = "low_rank"

    def __post_init__(self) -> None:
        if isinstance(self.fraction, bool) or not isinstance(self.fraction, numbers.Real):
            raise TypeError(
                f"fraction must be a number from 0 to 1, got {self.fraction!r}; try 1/16, a sixteenth of the pairs"
            )
        if not 0 <= self.fraction <= 1:
            raise ValueError(
                f"fraction must be from 0 to 1, got {self.fraction!r}; try 1/16, a sixteenth of the pairs; for a "
                "number of tokens take SampledTokens"
            )
        if self.control_variate not in get_args(ControlVariate):
            available = ", ".join(get_args(ControlVariate))
            raise ValueError(f"unknown control_variate {self.control_variate!r}; available: {available}")
        if self.fraction == 0 and self.control_variate == "none":
            raise ValueError(
                "fraction=0 with control_variate='none' leaves nothing of the loss; take control_variate='low_rank', "
                "or a fraction above 0"
            )


@dataclass(frozen=True)
class SampledTokens:
    """Value of ``sampling`` for all pairs of some tokens, as published.

    ``count`` tokens are drawn at random without replacement from each sequence, independently; the other tokens get no
    gradient. For as many pairs of a model's hidden states, 1,024 tokens, :class:`SampledPairs` has a 170th of the error
    at tau = 1 and a 20th at tau = 0.1 (docs/benchmarks.md).

    Args:
        count: number of tokens per sequence, at least 2; a sequence of at most ``count`` tokens keeps all.

    Raises:
        ValueError: ``count`` is no integer of at least 2.

    Example::

        fused_dispersion_loss(z, sampling=SampledTokens(256))
    """

    count: int

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, numbers.Integral) or self.count < 2:
            raise ValueError(
                f"count must be an integer of at least 2, because a pair needs two tokens, got {self.count!r}; for a "
                "fraction of the pairs take SampledPairs"
            )


Sampling = SampledPairs | SampledTokens


def resolve_sampling(sampling: Sampling | float | None) -> Sampling | None:
    """``sampling`` with a number converted to :class:`SampledPairs`; None, for all pairs, stays None."""
    if sampling is None or isinstance(sampling, Sampling):
        return sampling
    if isinstance(sampling, bool) or not isinstance(sampling, numbers.Real):
        raise TypeError(
            "sampling must be None for all pairs, a fraction of them, SampledPairs(fraction) or SampledTokens(count), "
            f"got {sampling!r}; try sampling=1/16"
        )
    return SampledPairs(sampling if isinstance(sampling, int) else float(sampling))
