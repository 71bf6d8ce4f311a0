"""Steering adapters for PEFT: edit a model's activations, train and load the edit like any other adapter.

Importing this package registers its tuner types with PEFT.
"""

from importlib.metadata import version

from peft_steer.positions.marks import MarkCompletions
from peft_steer.tuners.joint import (
    JointOptimizer,
    JointSteerLoraConfig,
    JointSteerLoraModel,
    joint_optimizer,
    joint_optimizer_cls_and_kwargs,
    orthogonality,
    project_,
)
from peft_steer.tuners.steer.config import JolaConfig, LofitConfig, LoreftConfig, PostBlockSteerConfig, SteerConfig
from peft_steer.tuners.steer.counting import acting_parameters
from peft_steer.tuners.steer.model import SteerModel
from peft_steer.tuners.steer.position_hooks import needs_prompts, steered_positions


__version__ = version("peft-steer")

__all__ = [
    "JointOptimizer",
    "JointSteerLoraConfig",
    "JointSteerLoraModel",
    "JolaConfig",
    "LofitConfig",
    "LoreftConfig",
    "MarkCompletions",
    "PostBlockSteerConfig",
    "SteerConfig",
    "SteerModel",
    "acting_parameters",
    "joint_optimizer",
    "joint_optimizer_cls_and_kwargs",
    "needs_prompts",
    "orthogonality",
    "project_",
    "steered_positions",
]
