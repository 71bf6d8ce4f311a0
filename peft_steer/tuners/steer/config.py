"""`SteerConfig`, and the named methods that are presets of it."""

import math
from dataclasses import dataclass, field, fields

from peft.config import PeftConfig

from peft_steer.interventions.low_rank import ACTIVATIONS
from peft_steer.positions.spec import check_positions, split
from peft_steer.registration import add_peft_type
from peft_steer.sites import SITES


HEAD_KINDS = ("lofit", "jola")
KINDS = ("vector", "linear", "nonlinear", "loreft", "noreft", "direft", "nodireft", *HEAD_KINDS)
WITH_ACTIVATION = ("nonlinear", "noreft", "direft", "nodireft")
_KINDS_HELP = ", ".join(map(repr, KINDS[:-1])) + f" or {KINDS[-1]!r}"
_SITE_HELP = (
    "Where: 'block', 'mlp' or 'attention' (their outputs), or 'heads' (the input of the output projection); or a list."
)
STEER = add_peft_type("STEER")


def _check_member(name: str, value, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}={value!r}` is unknown; choose one of {', '.join(map(repr, allowed))}.")


@dataclass
class SteerConfig(PeftConfig):
    """
    This is the configuration class to store the configuration of a [`SteerModel`]: a low-rank or constant edit of the
    hidden states at one place of every chosen block ("Weight Updates as Activation Shifts", arXiv 2603.00425).

    Args:
        site (`Union[str, list[str]]`):
            Where: `"block"` (the block's output, after the skip connection), `"mlp"` (the MLP's output before the
            skip), `"attention"` (the attention's output before the skip) or `"heads"` (what the attention's heads
            return, side by side, before the output projection). A list: at each of them, an edit of its own.
        kind (`str`):
            What: `"vector"` (`dh = v`), `"linear"` (`dh = W_up W_down h`, with `use_bias` `+ b`), `"nonlinear"`
            (`dh = W_up act(W_down h)`) or one of ReFT's, by the names of its authors' library: `"loreft"`
            (`dh = R^T (W h + b - R h)` with orthonormal rows in `R`), `"noreft"` (`dh = W2^T (f(W1 h + b) - W2 h)`),
            `"direft"` (`dh = R^T f(W h + b)` with orthonormal rows in `R`) or `"nodireft"`
            (`dh = W2^T f(W1 h + b)`, DiReFT as its paper writes it). Only at the heads: `"lofit"` and `"jola"`, see
            [`LofitConfig`] and [`JolaConfig`].
        r (`int`):
            Rank of the edit, at least 1 and at most the hidden size. `"vector"`, `"lofit"` and `"jola"` have none.
        activation (`str`, *optional*):
            The nonlinearity of the nonlinear kind: `"silu"` (its default), `"relu"`, `"gelu"` or `"tanh"`. For
            `"noreft"`, `"direft"` and `"nodireft"` it is `f`, by default the identity. (LoReFT has none: with a
            nonlinear `f` it could not start at `dh = 0`. DiReFT's cannot be `"relu"`, whose gradient is zero there.)
        use_bias (`bool`):
            Whether the linear kind has the bias `b`. (PEFT's name `bias` means the base model's biases.)
        scale (`float`):
            Factor of `dh`. It can be changed at inference: see [`SteerModel.set_scale`].
        positions (`str`):
            Which tokens are edited: `"all"`, `"last"` (the prompt's last), `"f7+l7"` (the prompt's first and last
            seven; any numbers, or one of the two), `"prompt"` or `"completion"`. See `peft_steer/positions/spec.py`.
        tie_weights (`bool`):
            Whether the prompt's first and last tokens share one edit. `False` gives each an edit of its own (with
            `positions` such as `"f7+l7"`).
        num_heads (`int`, *optional*):
            With `kind="lofit"`: how many heads are chosen, in all blocks together; by default a tenth of them.
        selection_step (`int`, *optional*):
            With `kind="lofit"`: after how many optimizer steps the heads are chosen, by default 100. The steps before
            it are its first stage, those after it the second; give them as many steps as either needs.
        l1_lambda (`float`, *optional*):
            With `kind="lofit"`: factor of the penalty of the first stage, by default 5e-4.
        target_modules (`Union[list[str], str]`, *optional*):
            The names of the blocks to steer: a list of names or suffixes, or a regular expression. By default every
            block of the text decoder, and of the encoder if the model has both.
        exclude_modules (`Union[list[str], str]`, *optional*):
            The names of blocks not to steer, matched in the same way.
        layers_to_transform (`Union[list[int], int]`, *optional*):
            The indices of the blocks to steer, in their stack.
        layers_pattern (`Union[list[str], str]`, *optional*):
            With `layers_to_transform`: the name of the stack that the indices refer to, such as `"decoder.block"`.
        rank_pattern (`dict[str, int]`):
            Ranks that differ from `r`, by the name (or regular expression) of the steered module.
        modules_to_save (`list[str]`, *optional*):
            Modules apart from the adapter to be trained and saved, such as a classification head.
        init_weights (`bool`):
            `True` starts at `dh = 0`. `False` starts at random, for tests.
        hidden_size (`int`, *optional*), num_blocks (`int`, *optional*):
            Recorded when the adapter is created, so that an adapter is never loaded onto a model of another width or
            depth.
    """

    site: str | list[str] = field(default="block", metadata={"help": _SITE_HELP})
    kind: str = field(default="linear", metadata={"help": f"What: {_KINDS_HELP}."})
    r: int = field(default=8, metadata={"help": "Rank of the edit."})
    activation: str | None = field(
        default=None,
        metadata={
            "help": "Nonlinearity, 'silu', 'relu', 'gelu' or 'tanh'; default: 'silu' for 'nonlinear', none for ReFT's."
        },
    )
    use_bias: bool = field(default=False, metadata={"help": "Whether kind='linear' has a bias b."})
    scale: float = field(default=1.0, metadata={"help": "Factor of the edit."})
    positions: str = field(
        default="all", metadata={"help": "Which tokens: 'all', 'last', 'f7+l7', 'prompt' or 'completion'."}
    )
    tie_weights: bool = field(
        default=True, metadata={"help": "Whether first and last tokens (positions='f7+l7') share one edit."}
    )
    num_heads: int | None = field(
        default=None, metadata={"help": "With kind='lofit': how many heads are chosen; default: a tenth of all."}
    )
    selection_step: int | None = field(
        default=None, metadata={"help": "With kind='lofit': optimizer steps before heads are chosen; default: 100."}
    )
    l1_lambda: float | None = field(
        default=None, metadata={"help": "With kind='lofit': factor of the first stage's penalty; default: 5e-4."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of the blocks to steer (suffixes or a regular expression); default: all text blocks."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of blocks not to steer (suffixes or a regular expression)."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks to steer, in their stack."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "With layers_to_transform: name of the stack the indices refer to."}
    )
    rank_pattern: dict = field(
        default_factory=dict, metadata={"help": "Ranks by name of the steered module, where they differ from r."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules apart from the adapter to be trained and saved."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "True: start at dh = 0. False: start at random (tests)."}
    )
    hidden_size: int | None = field(default=None, metadata={"help": "Recorded: width of the model."})
    num_blocks: int | None = field(default=None, metadata={"help": "Recorded: number of blocks of the model."})

    @classmethod
    def from_peft_type(cls, **kwargs):
        """As PEFT's, but on a preset it returns the preset's class: all presets share one PEFT type."""
        config = super().from_peft_type(**kwargs)
        if isinstance(config, cls) or not isinstance(config, SteerConfig):
            return config
        return cls(**{f.name: getattr(config, f.name) for f in fields(cls) if f.init})

    @property
    def sites(self) -> list[str]:
        """`site` as a list."""
        return [self.site] if isinstance(self.site, str) else list(self.site)

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = STEER
        # Those of a file. What an injection writes later describes its own model and binds no other.
        self._made_for = (self.hidden_size, self.num_blocks)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        for site in self.sites:
            _check_member("site", site, SITES)
        if not self.sites or len(set(self.sites)) < len(self.sites):
            raise ValueError(f"`site={self.site!r}` must name at least one place, and each only once.")
        _check_member("kind", self.kind, KINDS)
        check_positions(self.positions)
        if not self.tie_weights and len(split(self.positions)) < 2:
            raise ValueError(
                f"`tie_weights=False` contradicts `positions={self.positions!r}`: only first and last tokens "
                "together, such as positions='f7+l7', can have edits of their own."
            )
        if not self.tie_weights and self.kind in HEAD_KINDS:
            raise ValueError(
                f"`tie_weights=False` contradicts `kind={self.kind!r}`, which chooses among one set of heads."
            )
        self.rank_pattern = self.rank_pattern or {}
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)) or not math.isfinite(self.scale):
            raise ValueError(f"`scale={self.scale!r}` must be a finite number.")
        for name, rank in {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(f"`{name}={rank!r}` must be an integer of at least 1.")
        self._check_activation()
        self._check_heads()
        if self.use_bias and self.kind != "linear":
            raise ValueError(
                f"`use_bias=True` contradicts `kind={self.kind!r}`: only kind='linear' has an optional bias."
            )
        if self.kind in ("vector", *HEAD_KINDS) and self.rank_pattern:
            raise ValueError(f"`rank_pattern` contradicts `kind={self.kind!r}`: vectors have no rank.")
        if self.target_modules == "all-linear":
            raise ValueError(
                "`target_modules='all-linear'` names linears; steering targets blocks. Leave it unset for all."
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a regular expression.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "`layers_pattern` needs `layers_to_transform`: it names the stack that the indices refer to."
            )

    def _check_heads(self) -> None:
        if self.kind in HEAD_KINDS and self.sites != ["heads"]:
            raise ValueError(
                f"`site={self.site!r}` contradicts `kind={self.kind!r}`, which edits attention heads. "
                "Set `site='heads'`."
            )
        if self.kind != "lofit":
            for name in ("num_heads", "selection_step", "l1_lambda"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}={getattr(self, name)!r}` contradicts `kind={self.kind!r}`: only kind='lofit' has it."
                    )
            return
        self.selection_step = 100 if self.selection_step is None else self.selection_step
        self.l1_lambda = 5e-4 if self.l1_lambda is None else self.l1_lambda
        for name in ("num_heads", "selection_step"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}={value!r}` must be an integer of at least 1.")
        value = self.l1_lambda
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"`l1_lambda={value!r}` must be a finite number of at least 0.")

    def _check_activation(self) -> None:
        if self.kind == "nonlinear":
            self.activation = self.activation or "silu"
        if self.activation is None:
            return
        if self.kind not in WITH_ACTIVATION:
            raise ValueError(
                f"`activation={self.activation!r}` contradicts `kind={self.kind!r}`: only the kinds "
                f"{', '.join(map(repr, WITH_ACTIVATION))} have one. Remove `activation` or choose one of them."
            )
        _check_member("activation", self.activation, ACTIVATIONS)
        if self.kind == "direft" and self.activation == "relu":
            raise ValueError(
                "`activation='relu'` contradicts `kind='direft'`: it starts at `f(0)`, where relu's gradient is zero, "
                "and would never leave it. Choose another activation, or `kind='nodireft'`."
            )


@dataclass
class PostBlockSteerConfig(SteerConfig):
    """
    [`SteerConfig`] with the paper's method as default: post-block steering, `dh = W_up silu(W_down h)` at rank 8 at
    every block's output (arXiv 2603.00425). The paper found the linear kind better on 1B models, this one on 4B and
    larger.
    """

    kind: str = field(default="nonlinear", metadata={"help": f"What: {_KINDS_HELP}."})


@dataclass
class LoreftConfig(SteerConfig):
    """
    [`SteerConfig`] with LoReFT as default (arXiv 2404.03592, equation 2), at the MLP's output as arXiv 2603.00425
    states it, on every token. `site="block"` is where the method's authors apply it.
    """

    site: str | list[str] = field(default="mlp", metadata={"help": _SITE_HELP})
    kind: str = field(default="loreft", metadata={"help": f"What: {_KINDS_HELP}."})


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

    site: str = field(default="heads", metadata={"help": _SITE_HELP})
    kind: str = field(default="lofit", metadata={"help": f"What: {_KINDS_HELP}."})


@dataclass
class JolaConfig(SteerConfig):
    """
    [`SteerConfig`] with JoLA as default (arXiv 2502.01179): `z' = (1 + g2 * A) * z + g1 * v` for every attention head,
    on every token, with hard-concrete gates `g1`, `g2` of each head and a penalty on their being open. The constants
    are the paper's (see `jola.py`). Trainers stay as they are: the penalty is added, and the steps of its
    schedule are counted, around the optimizer's step (see `optimizer_hooks.py`).
    """

    site: str = field(default="heads", metadata={"help": _SITE_HELP})
    kind: str = field(default="jola", metadata={"help": f"What: {_KINDS_HELP}."})
