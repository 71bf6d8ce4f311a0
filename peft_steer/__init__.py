"""Steering adapters for PEFT: edit a model's activations, train and load the edit like any other adapter.

Importing this package registers its tuner types with PEFT.
"""

from importlib.metadata import version

from peft_steer.interventions import acting_parameters
from peft_steer.positions.marks import MarkCompletions
from peft_steer.tuners.joint import (
    JointLowRank,
    JointOptimizer,
    JointSteerLayer,
    JointSteerLoraConfig,
    JointSteerLoraModel,
    orthogonality,
    project_,
)
from peft_steer.tuners.steer.config import SteerConfig
from peft_steer.tuners.steer.layer import SteerLayer, steered_modules
from peft_steer.tuners.steer.model import SteerModel
from peft_steer.tuners.steer.position_hooks import needs_prompts, steered_positions
from peft_steer.tuners.steer.presets import JolaConfig, LofitConfig, LoreftConfig, PostBlockSteerConfig


__version__ = version("peft-steer")

__all__ = [
    "JointLowRank",
    "JointOptimizer",
    "JointSteerLayer",
    "JointSteerLoraConfig",
    "JointSteerLoraModel",
    "JolaConfig",
    "LofitConfig",
    "LoreftConfig",
    "MarkCompletions",
    "PostBlockSteerConfig",
    "SteerConfig",
    "SteerLayer",
    "SteerModel",
    "acting_parameters",
    "needs_prompts",
    "orthogonality",
    "project_",
    "steered_modules",
    "steered_positions",
]
