"""Backends: the tiled loss in PyTorch, the CPU kernel, and the GPU kernels in Triton and CUDA C++."""
