"""Benchmarks of the dispersion loss: ``python -m benchmarks --suite loss`` (or memory)."""
