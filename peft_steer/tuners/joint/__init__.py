"""Joint adaptation: LoRA and steering trained together, in one adapter (arXiv 2603.00425)."""

from .config import JointSteerLoraConfig
from .model import JointSteerLoraModel
from .optimizer import JointOptimizer, joint_optimizer, joint_optimizer_cls_and_kwargs
from .saving import orthogonality, project_


__all__ = [
    "JointOptimizer",
    "JointSteerLoraConfig",
    "JointSteerLoraModel",
    "joint_optimizer",
    "joint_optimizer_cls_and_kwargs",
    "orthogonality",
    "project_",
]
