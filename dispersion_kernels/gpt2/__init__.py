"""Minimal GPT-2 trainer with the dispersion loss; its command is ``dispersion-gpt2``.

Importing this package needs PyTorch only. Reading weights, tokenising, the progress bar and the picture need
``pip install '.[gpt2]'`` and import their libraries on use.
"""

from .model import GPT2, PRESETS, GPT2Config, GPT2Output, load_weights, save_weights

__all__ = ["GPT2", "PRESETS", "GPT2Config", "GPT2Output", "load_weights", "save_weights"]
