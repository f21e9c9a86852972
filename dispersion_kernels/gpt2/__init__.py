"""A minimal GPT-2 trainer with the dispersion loss; the command is `dispersion-gpt2`.

Importing this package needs PyTorch only. Reading weights, tokenising, the progress bar and the picture need
`pip install "dispersion-kernels[gpt2]"` and import their libraries when they are used.
"""

from .model import GPT2, PRESETS, GPT2Config, GPT2Output, load_weights, save_weights

__all__ = ["GPT2", "PRESETS", "GPT2Config", "GPT2Output", "load_weights", "save_weights"]
