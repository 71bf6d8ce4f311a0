"""JoLA (arXiv 2502.01179): heads edited through hard-concrete gates, which learn which heads and how.

Constants are the paper's and its code's: the gate is a sigmoid of temperature `beta`, stretched from (0, 1) to
(`gamma`, `zeta`) and clamped, so that it can be exactly closed or open.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from .base import Device, Dtype, at_least_float32
from .heads import HeadEdit
from .optimizer_hooks import Group, Update
from .options import Option, check_count, check_member, check_non_negative


GAMMA, ZETA, BETA, EPS = -0.1, 1.1, 0.33, 1e-6
# How `lambda` goes with the optimizer steps `t` done, given `gate_lambda` (`x`) and `gate_steps` (`n`); and the values
# of these two in the authors' code. None: the schedule does not have it.
SCHEDULES: dict[str, Callable[[int, Any, Any], float]] = {
    "exponential": lambda t, x, n: x * math.exp(-t / n),
    "linear": lambda t, x, n: x * min(t / n, 1.0),
    "cyclic": lambda t, x, n: 0.5 + 0.5 * math.sin(2 * math.pi * t / n),
    "constant": lambda t, x, n: x,
}
GATE_LAMBDA = {"exponential": 0.1, "linear": 0.2, "cyclic": None, "constant": 0.1}
GATE_STEPS = {"exponential": 100, "linear": None, "cyclic": 20, "constant": None}


def training_gate(log_g: torch.Tensor) -> torch.Tensor:
    """A random gate in [0, 1] for every entry: `clamp(1.2 sigmoid((logit u + log g) / beta) - 0.1, 0, 1)` with `u`
    uniform on (eps, 1 - eps)."""
    u = (1 - 2 * EPS) * torch.rand_like(log_g) + EPS
    return _stretched(torch.sigmoid((torch.logit(u) + log_g) / BETA))


def evaluation_gate(log_g: torch.Tensor) -> torch.Tensor:
    """The gate in evaluation: `clamp(1.2 sigmoid(log g) - 0.1, 0, 1)`."""
    return _stretched(torch.sigmoid(log_g))


def _stretched(gate: torch.Tensor) -> torch.Tensor:
    return ((ZETA - GAMMA) * gate + GAMMA).clamp(0, 1)


def p_open(log_g: torch.Tensor) -> torch.Tensor:
    """The probability that a training gate is not zero: `sigmoid(log g + beta ln 11)`."""
    return torch.sigmoid(log_g - BETA * math.log(-GAMMA / ZETA))


class Jola(HeadEdit):
    """`z' = (1 + g2 * A) * z + g1 * v` with gates `g1`, `g2` for every head.

    `log_g1`, `log_g2`: `(H,)`, Xavier-uniform at the start as in the authors' code, where `A = 0` and `v = 0` make
    `dz = 0` whatever the gates. In training every forward pass draws one gate for each head and each of the two,
    shared by the batch; recomputed under gradient checkpointing it draws the same, by the random state that
    checkpointing restores (`preserve_rng_state`, torch's default). The loss gains the expected-L0 penalty
    `[lambda sum_l mean_h p_open(g1) + (1 - lambda) sum_l mean_h p_open(g2)] / (L H)` over the adapter's `L` layers,
    with `lambda` by the schedule: `0.1 exp(-0.01 t)` after `t` optimizer steps, unless another is chosen.

    Args:
        num_heads, head_dim, group: as [`HeadEdit`]'s.
        schedule, gate_lambda, gate_steps: as [`SteerConfig`] has them, resolved by `check_config`.
    """

    options: ClassVar[Mapping[str, Option]] = {
        "gate_schedule": Option("exponential", lambda name, value: check_member(name, value, SCHEDULES)),
        "gate_lambda": Option(None, check_non_negative),
        "gate_steps": Option(None, check_count),
    }

    @classmethod
    def check_config(cls, config: Any) -> None:
        schedule = f"`gate_schedule={config.gate_schedule!r}`"
        if config.gate_lambda is None:
            config.gate_lambda = GATE_LAMBDA[config.gate_schedule]
        elif config.gate_schedule == "cyclic":
            raise ValueError(f"`gate_lambda={config.gate_lambda}` contradicts {schedule}: it swings between 0 and 1.")
        elif config.gate_lambda > 1:
            raise ValueError(f"`gate_lambda={config.gate_lambda}` must be at most 1: `1 - lambda` is a weight too.")
        if config.gate_steps is None:
            config.gate_steps = GATE_STEPS[config.gate_schedule]
            if config.gate_schedule == "linear":
                raise ValueError(f"{schedule} needs `gate_steps`: over how many optimizer steps it grows.")
        elif config.gate_schedule == "constant":
            raise ValueError(f"`gate_steps={config.gate_steps}` contradicts {schedule}: nothing changes with steps.")

    @classmethod
    def arguments(cls, config: Any) -> dict[str, Any]:
        return {
            "schedule": config.gate_schedule,
            "gate_lambda": config.gate_lambda,
            "gate_steps": config.gate_steps,
        }

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        group: Group | None = None,
        schedule: str = "exponential",
        gate_lambda: float | None = 0.1,
        gate_steps: int | None = 100,
        init_weights: bool = True,
        device: Device = None,
        dtype: Dtype = None,
    ):
        super().__init__(num_heads, head_dim, group, device=device, dtype=dtype)
        self.schedule, self.gate_lambda, self.gate_steps = schedule, gate_lambda, gate_steps
        self.log_g1 = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.log_g2 = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        # Never called. Whoever turns dropout off (TRL's `disable_dropout`) turns off the gates' randomness as well.
        self.noise = nn.Dropout()
        self.reset_parameters(init_weights)

    def reset_parameters(self, init_weights: bool = True) -> None:
        super().reset_parameters(init_weights)
        bound = math.sqrt(6 / (len(self.A) + 1))
        for log_g in (self.log_g1, self.log_g2):
            nn.init.uniform_(log_g, -bound, bound)

    def gates(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`g1` and `g2` of a forward pass, `(H,)`: random in training, the same ones always in evaluation, and where
        nothing is trained (a reference copy may be in training mode)."""
        draws = self.training and self.noise.p > 0 and any(p.requires_grad for p in self.parameters())
        gate = training_gate if draws else evaluation_gate
        return gate(at_least_float32(self.log_g1)), gate(at_least_float32(self.log_g2))

    def acting(self) -> tuple[torch.Tensor, torch.Tensor]:
        g1, g2 = self.gates()
        return g2[:, None] * at_least_float32(self.A), g1[:, None] * at_least_float32(self.v)

    @staticmethod
    def before_step(edits: list[Any], update: Update) -> None:
        first = edits[0]
        weight = SCHEDULES[first.schedule](first.steps.item(), first.gate_lambda, first.gate_steps)
        for edit in edits:
            heads = len(edit.A)
            for log_g, factor in ((edit.log_g1, weight), (edit.log_g2, 1 - weight)):
                p = p_open(at_least_float32(log_g))
                update.add_gradient(log_g, p * (1 - p) * (factor / (len(edits) * heads * heads)))
