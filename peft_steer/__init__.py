"""Steering adapters for PEFT: edit a model's activations, train and load the edit like any other adapter.

Importing this package registers its tuner types with PEFT.
"""

from importlib.metadata import version

from .config import JolaConfig, LofitConfig, LoreftConfig, PostBlockSteerConfig, SteerConfig
from .joint import (
    JointOptimizer,
    JointSteerLoraConfig,
    JointSteerLoraModel,
    joint_optimizer,
    joint_optimizer_cls_and_kwargs,
    orthogonality,
    project_,
)
from .model import SteerModel
from .tracking import needs_prompts, steered_positions


__version__ = version("peft-steer")

__all__ = [
    "JointOptimizer",
    "JointSteerLoraConfig",
    "JointSteerLoraModel",
    "JolaConfig",
    "LofitConfig",
    "LoreftConfig",
    "PostBlockSteerConfig",
    "SteerConfig",
    "SteerModel",
    "joint_optimizer",
    "joint_optimizer_cls_and_kwargs",
    "needs_prompts",
    "orthogonality",
    "project_",
    "steered_positions",
]
