"""Steering vectors without training, from contrastive texts: `initialize_vectors`, and `peft-steer extract`.

It stands beside `train`: both make adapters of what `peft_steer` and `peft_steer.evaluation` offer.
"""

from .start import initialize_vectors


__all__ = ["initialize_vectors"]
