"""`SteerConfig`: where, what and which tokens, and every contradiction between them."""

import math
import warnings
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field, fields
from functools import partial
from typing import Any

from peft.config import PeftConfig

from peft_steer.interventions import KINDS, Intervention
from peft_steer.interventions.options import check_count, check_member
from peft_steer.positions.spec import check_positions, split
from peft_steer.registration import add_peft_type
from peft_steer.sites import SITES

from .files import check_same


KINDS_HELP = f"one of {', '.join(map(repr, KINDS))}"
SITE_HELP = (
    "Where: 'block', 'mlp' or 'attention' (their outputs), or 'heads' (the input of the output projection); or a list."
)
STEER = add_peft_type("STEER")


def _names(condition: Callable[[type[Intervention]], bool]) -> str:
    """The kinds whose class meets the condition, for a message."""
    return ", ".join(repr(name) for name, cls in KINDS.items() if condition(cls))


def _has_option(name: str, cls: type[Intervention]) -> bool:
    return name in cls.options


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
            seven; any numbers, or one of the two), `"prompt"` or `"completion"`. See `positions/spec.py`.
        share_weights (`bool`):
            Whether the prompt's first and last tokens share one edit. `False` gives each an edit of its own (with
            `positions` such as `"f7+l7"`). (Files of earlier versions call it `tie_weights`.)
        num_heads (`int`, *optional*):
            With `kind="lofit"`: how many heads are chosen, in all blocks together; by default a tenth of them.
        selection_step (`int`, *optional*):
            With `kind="lofit"`: after how many optimizer steps the heads are chosen, by default 100. The steps before
            it are its first stage, those after it the second; give them as many steps as either needs.
        l1_lambda (`float`, *optional*):
            With `kind="lofit"`: factor of the penalty of the first stage, by default 5e-4.
        gate_schedule (`str`, *optional*):
            With `kind="jola"`: how `lambda`, the weight of the penalty on the gate of `v` (`1 - lambda` weighs that on
            the gate of `A`), goes with the optimizer steps `t` done: `"exponential"`, `gate_lambda exp(-t /
            gate_steps)`, the default; `"linear"`, from 0 to `gate_lambda` in `gate_steps`; `"cyclic"`, `0.5 + 0.5
            sin(2 pi t / gate_steps)`; or `"constant"`, `gate_lambda`.
        gate_lambda (`float`, *optional*):
            With `kind="jola"`: see `gate_schedule`; by default 0.1, with `"linear"` 0.2.
        gate_steps (`int`, *optional*):
            With `kind="jola"`: see `gate_schedule`; by default 100, with `"cyclic"` 20. `"linear"` needs it.
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

    site: str | list[str] = field(default="block", metadata={"help": SITE_HELP})
    kind: str = field(default="linear", metadata={"help": f"What: {KINDS_HELP}."})
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
    share_weights: bool = field(
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
    gate_schedule: str | None = field(
        default=None,
        metadata={"help": "With kind='jola': 'exponential' (default), 'linear', 'cyclic' or 'constant' lambda."},
    )
    gate_lambda: float | None = field(
        default=None, metadata={"help": "With kind='jola': first, last or constant lambda; default: 0.1, linear: 0.2."}
    )
    gate_steps: int | None = field(
        default=None, metadata={"help": "With kind='jola': steps of the schedule; default: 100, cyclic: 20."}
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
    rank_pattern: dict[str, int] = field(
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
    tie_weights: InitVar[bool | None] = None  # the old name of `share_weights`, in files

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Any:
        """As PEFT's, but on a preset it returns the preset's class: all presets share one PEFT type."""
        unknown = kwargs.keys() - {"tie_weights", *(f.name for f in fields(cls))}
        if unknown and kwargs.get("peft_type") == STEER:  # PEFT's own warning would name the type's class
            warnings.warn(
                f"Unexpected keyword arguments {sorted(unknown)} for class {cls.__name__}, these are ignored. "
                "The file was probably saved by a newer version of peft-steer, which may load it otherwise.",
                stacklevel=2,
            )
            kwargs = {name: value for name, value in kwargs.items() if name not in unknown}
        config = super().from_peft_type(**kwargs)  # type: ignore[no-untyped-call]  # PEFT's
        if isinstance(config, cls) or not isinstance(config, SteerConfig):
            return config
        return cls(**{f.name: getattr(config, f.name) for f in fields(cls) if f.init})

    @property
    def sites(self) -> list[str]:
        """`site` as a list."""
        return [self.site] if isinstance(self.site, str) else list(self.site)

    @property
    def intervention(self) -> type[Intervention]:
        """The class of the edits."""
        return KINDS[self.kind]

    def check_file(self, loaded: PeftConfig, adapter_name: str, path: str) -> None:
        """Raise `ValueError` if `loaded`, the configuration of a file, is not that of this adapter."""
        bookkeeping = {"init_weights", "modules_to_save", *(f.name for f in fields(PeftConfig))}
        names = [f.name for f in fields(SteerConfig) if f.name not in bookkeeping]
        check_same(self, loaded, names, adapter_name, path)

    def __post_init__(self, tie_weights: bool | None) -> None:
        from_file = self.peft_type is not None
        super().__post_init__()  # type: ignore[no-untyped-call]  # PEFT's
        self.peft_type = STEER
        # Those of a file. What an injection writes later describes its own model and binds no other.
        self._made_for = (self.hidden_size, self.num_blocks)
        if tie_weights is not None:
            if not from_file:
                raise ValueError(
                    f"`tie_weights={tie_weights!r}` is now `share_weights={tie_weights!r}`: elsewhere the old name "
                    "means tied embeddings."
                )
            self.share_weights = tie_weights
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        self.rank_pattern = self.rank_pattern or {}
        self._check_site()
        check_member("kind", self.kind, KINDS)
        self._check_positions()
        self._check_numbers()
        self._check_kind()
        self._check_blocks()

    def _check_site(self) -> None:
        for site in self.sites:
            check_member("site", site, SITES)
        if not self.sites or len(set(self.sites)) < len(self.sites):
            raise ValueError(f"`site={self.site!r}` must name at least one place, and each only once.")

    def _check_positions(self) -> None:
        check_positions(self.positions)
        if not self.share_weights and len(split(self.positions)) < 2:
            raise ValueError(
                f"`share_weights=False` contradicts `positions={self.positions!r}`: only first and last tokens "
                "together, such as positions='f7+l7', can have edits of their own."
            )
        if not self.share_weights and self.intervention.edits_heads:
            raise ValueError(
                f"`share_weights=False` contradicts `kind={self.kind!r}`, which chooses among one set of heads."
            )

    def _check_numbers(self) -> None:
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)) or not math.isfinite(self.scale):
            raise ValueError(f"`scale={self.scale!r}` must be a finite number.")
        for name, rank in {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}.items():
            check_count(name, rank)

    def _check_kind(self) -> None:
        """The fields that depend on the kind, as its class declares them."""
        kind, cls = f"`kind={self.kind!r}`", self.intervention
        if cls.edits_heads and self.sites != ["heads"]:
            raise ValueError(
                f"`site={self.site!r}` contradicts {kind}, which edits attention heads. Set `site='heads'`."
            )
        self.activation = self.activation or cls.default_activation
        if self.activation is not None:
            if not cls.activations:
                raise ValueError(
                    f"`activation={self.activation!r}` contradicts {kind}: only the kinds "
                    f"{_names(lambda c: bool(c.activations))} have one. Remove `activation` or choose one of them."
                )
            check_member("activation", self.activation, cls.activations)
        if self.use_bias and not cls.has_bias:
            raise ValueError(
                f"`use_bias=True` contradicts {kind}: only {_names(lambda c: c.has_bias)} has an optional bias."
            )
        if self.rank_pattern and not cls.has_rank:
            raise ValueError(f"`rank_pattern` contradicts {kind}: it has no rank.")
        self._check_options(kind)
        cls.check_config(self)

    def _check_options(self, kind: str) -> None:
        for name in sorted({name for c in KINDS.values() for name in c.options}):
            option, value = self.intervention.options.get(name), getattr(self, name)
            if option is None:
                if value is not None:
                    owners = _names(partial(_has_option, name))
                    raise ValueError(f"`{name}={value!r}` contradicts {kind}: only kind={owners} has it.")
                continue
            if value is None:
                setattr(self, name, option.default)
            else:
                option.check(name, value)

    def _check_blocks(self) -> None:
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
