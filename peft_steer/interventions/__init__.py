"""What is added to a hidden state: one small module for each equation. `KINDS` has their classes by name."""

from .base import Intervention, acting_parameters
from .jola import Jola
from .lofit import Lofit
from .low_rank import FixedVector, Linear, LowRank, Nonlinear
from .reft import Direft, Loreft, Nodireft, Noreft


KINDS: dict[str, type[Intervention]] = {
    "vector": FixedVector,
    "linear": Linear,
    "nonlinear": Nonlinear,
    "loreft": Loreft,
    "noreft": Noreft,
    "direft": Direft,
    "nodireft": Nodireft,
    "lofit": Lofit,
    "jola": Jola,
}

__all__ = [
    "KINDS",
    "Direft",
    "FixedVector",
    "Intervention",
    "Jola",
    "Linear",
    "Lofit",
    "Loreft",
    "LowRank",
    "Nodireft",
    "Nonlinear",
    "Noreft",
    "acting_parameters",
]
