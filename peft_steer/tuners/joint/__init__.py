"""Joint adaptation: LoRA and steering trained together, in one adapter (arXiv 2603.00425)."""

from .config import JointSteerLoraConfig
from .layer import JointSteerLayer
from .model import JointSteerLoraModel
from .optimizer import JointOptimizer
from .projection import JointLowRank
from .saving import orthogonality, project_


__all__ = [
    "JointLowRank",
    "JointOptimizer",
    "JointSteerLayer",
    "JointSteerLoraConfig",
    "JointSteerLoraModel",
    "orthogonality",
    "project_",
]
