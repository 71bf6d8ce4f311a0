"""Steering adapters for PEFT: edit a model's activations, train and load the edit like any other adapter.

Importing this package registers its tuner types with PEFT.
"""

from .config import LoreftConfig, PostBlockSteerConfig, SteerConfig
from .model import SteerModel


__all__ = ["LoreftConfig", "PostBlockSteerConfig", "SteerConfig", "SteerModel"]
