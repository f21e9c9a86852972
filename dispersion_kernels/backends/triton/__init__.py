"""The Triton backend, the only part of ``dispersion_kernels`` whose import imports Triton."""
