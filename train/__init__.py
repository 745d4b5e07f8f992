"""Training: one file per action, started from the project's root with `python -m train.x` or `torchrun -m train.x`."""
