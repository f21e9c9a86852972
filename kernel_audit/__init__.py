"""The shipped GPU kernels examined without a GPU: compiled ahead of time, read as machine code, timed on paper."""
