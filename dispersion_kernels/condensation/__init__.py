"""Measurement and pictures of embedding condensation: the mean pairwise cosine of the tokens, layer by layer.

In small language models the embeddings of a sequence's tokens gather in a narrow cone, the more so the deeper the
layer. Liu et al., "Dispersion loss counteracts embedding condensation and improves generalization in small language
models" (ICML 2026, arXiv 2602.00217) measure it by the cosine of every pair of tokens, layer by layer.
"""

from .cosine import condensation_by_layer, mean_pairwise_cosine
from .measure import measure_condensation
from .models import load_model
from .monitor import CondensationMonitor
from .plot import plot_condensation, plot_heat_map, plot_training
from .records import Record, read_records, write_records
from .result import BINS, QUANTILES, Condensation, CosineStatistics, Layer, PublishedMeasurement, Trend

__all__ = [
    "BINS",
    "QUANTILES",
    "Condensation",
    "CondensationMonitor",
    "CosineStatistics",
    "Layer",
    "PublishedMeasurement",
    "Record",
    "Trend",
    "condensation_by_layer",
    "load_model",
    "mean_pairwise_cosine",
    "measure_condensation",
    "plot_condensation",
    "plot_heat_map",
    "plot_training",
    "read_records",
    "write_records",
]
