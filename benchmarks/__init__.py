"""Benchmarks of the dispersion loss: ``python -m benchmarks --suite NAME``."""
