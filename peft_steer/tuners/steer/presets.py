"""The named methods: `SteerConfig` with their defaults."""

from dataclasses import dataclass, field

from .config import KINDS_HELP, SITE_HELP, SteerConfig


@dataclass
class PostBlockSteerConfig(SteerConfig):
    """
    [`SteerConfig`] with the paper's method as default: post-block steering, `dh = W_up silu(W_down h)` at rank 8 at
    every block's output (arXiv 2603.00425). The paper found the linear kind better on 1B models, this one on 4B and
    larger.
    """

    kind: str = field(default="nonlinear", metadata={"help": f"What: {KINDS_HELP}."})


@dataclass
class LoreftConfig(SteerConfig):
    """
    [`SteerConfig`] with LoReFT as default (arXiv 2404.03592, equation 2), at the MLP's output as arXiv 2603.00425
    states it, on every token. `site="block"` is where the method's authors apply it.
    """

    site: str | list[str] = field(default="mlp", metadata={"help": SITE_HELP})
    kind: str = field(default="loreft", metadata={"help": f"What: {KINDS_HELP}."})


@dataclass
class LofitConfig(SteerConfig):
    """
    [`SteerConfig`] with LoFiT as default (arXiv 2406.01563): `z' = (1 + A) * z + v` for every attention head, on every
    token. In the first `selection_step` optimizer steps `A` of all heads is trained, with
    `l1_lambda * sum |A|` added to the loss; then the `num_heads` heads with the largest L2 norm of `A` are chosen,
    `A` returns to zero, and only the chosen heads' `v` are trained. Trainers stay as they are; the steps are
    counted, the penalty added and the heads chosen around the optimizer's step (see `optimizer_hooks.py`), and are
    saved with the adapter. (The authors train in two runs.)
    """

    site: str = field(default="heads", metadata={"help": SITE_HELP})
    kind: str = field(default="lofit", metadata={"help": f"What: {KINDS_HELP}."})


@dataclass
class JolaConfig(SteerConfig):
    """
    [`SteerConfig`] with JoLA as default (arXiv 2502.01179): `z' = (1 + g2 * A) * z + g1 * v` for every attention head,
    on every token, with hard-concrete gates `g1`, `g2` of each head and a penalty on their being open, which
    `gate_schedule` weighs. The other constants are the paper's (see `jola.py`). Trainers stay as they are: the penalty
    is added, and the steps of its schedule are counted, around the optimizer's step (see `optimizer_hooks.py`).
    """

    site: str = field(default="heads", metadata={"help": SITE_HELP})
    kind: str = field(default="jola", metadata={"help": f"What: {KINDS_HELP}."})
