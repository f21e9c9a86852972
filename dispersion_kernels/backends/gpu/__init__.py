"""The common part of the GPU backends: the launcher, and the potentials in the form that their kernels take."""
