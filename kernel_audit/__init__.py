"""Examination of the shipped GPU kernels without a GPU: ahead-of-time compilation, machine code, and a time model."""
