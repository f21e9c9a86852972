"""Dispersion loss against embedding condensation, over all pairs of tokens, in tiles."""

from dispersion_kernels._version import __version__
from dispersion_kernels.backends.registry import Support, supported
from dispersion_kernels.loss import DispersionLoss, SamplingStats, fused_dispersion_loss
from dispersion_kernels.potentials import (
    AngularSpread,
    Decorrelation,
    DispersiveL2,
    L2Repel,
    Orthogonalization,
    PerplexityEntropy,
    Potential,
    Uniformity,
)
from dispersion_kernels.regularizer import DispersionRegularizer
from dispersion_kernels.sampling import SampledPairs, SampledTokens

__all__ = [
    "AngularSpread",
    "Decorrelation",
    "DispersionLoss",
    "DispersionRegularizer",
    "DispersiveL2",
    "L2Repel",
    "Orthogonalization",
    "PerplexityEntropy",
    "Potential",
    "SampledPairs",
    "SampledTokens",
    "SamplingStats",
    "Support",
    "Uniformity",
    "__version__",
    "fused_dispersion_loss",
    "supported",
]
