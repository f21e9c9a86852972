"""The Triton backend. Importing this package imports Triton; nothing else in ``dispersion_kernels`` does."""
