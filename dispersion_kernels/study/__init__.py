"""Studies with the trainer: sweeps over its options (``dispersion sweep``) and their statistics (``dispersion stats``).

Both need ``pip install '.[study]'``.
"""
