"""What the GPU backends share: the launcher, and the potentials as their kernels take them."""
