"""`JointSteerLoraConfig`: LoRA's configuration with the steering fields, under the prefix `steer_`."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from peft import LoraConfig

from peft_steer.registration import add_peft_type

from ..steer.config import SteerConfig


JOINT_STEER_LORA = add_peft_type("JOINT_STEER_LORA")
ORTHOGONAL = ("always", "periodic", "none")
_STEER_FIELDS = (
    "site", "kind", "r", "activation", "use_bias", "scale", "positions", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "rank_pattern", "init_weights", "hidden_size", "num_blocks",
)  # fmt: skip


@dataclass
class JointSteerLoraConfig(LoraConfig):
    """
    This is the configuration class to store the configuration of a [`JointSteerLoraModel`]: LoRA and steering trained
    together in one adapter ("Weight Updates as Activation Shifts", arXiv 2603.00425, joint adaptation). All of
    [`~peft.LoraConfig`]'s fields keep their meaning; what follows is added.

    Args:
        steer_site, steer_kind, steer_r, steer_activation, steer_use_bias, steer_scale, steer_positions,
        steer_target_modules, steer_exclude_modules, steer_layers_to_transform, steer_layers_pattern,
        steer_rank_pattern, steer_init_weights:
            As [`SteerConfig`]'s fields without the prefix. By default `dh = W_up silu(W_down h)` at rank 8 at every
            block's output.
        orthogonal (`str`, *optional*):
            Whether `W_down` stays orthogonal to the columns of `lora_B` of the linear layer that ends the block's MLP
            (`down_proj`, `fc2`, ...): to what LoRA writes into the residual stream there. `"always"`: by a
            differentiable projection in the forward pass, and in place after every optimizer step. `"periodic"`: in
            place after every `orthogonal_interval` optimizer steps, as the paper trained. `"none"`. By default
            `"always"` in the blocks where LoRA targets that layer, and nothing in the others, where there is nothing
            to be orthogonal to. `"always"` and `"periodic"` raise where a steered block has no such layer. No callback
            has to be registered. A saved adapter satisfies the constraint: the file gets projected copies, and
            evaluation computes with them. (With `"periodic"`, save at multiples of the interval, so that resuming is
            exact.)
        orthogonal_interval (`int`, *optional*):
            With `orthogonal="periodic"`: number of optimizer steps from one projection to the next.
        steer_hidden_size (`int`, *optional*), steer_num_blocks (`int`, *optional*):
            Recorded when the adapter is created, so that an adapter is never loaded onto a model of another width or
            depth.
    """

    steer_site: str | list[str] = field(
        default="block", metadata={"help": "Where to steer: 'block', 'mlp' or 'attention', or a list of them."}
    )
    steer_kind: str = field(default="nonlinear", metadata={"help": "What: as SteerConfig's kind."})
    steer_r: int = field(default=8, metadata={"help": "Rank of the edit."})
    steer_activation: str | None = field(default=None, metadata={"help": "Nonlinearity, as SteerConfig's activation."})
    steer_use_bias: bool = field(default=False, metadata={"help": "Whether steer_kind='linear' has a bias b."})
    steer_scale: float = field(default=1.0, metadata={"help": "Factor of the edit."})
    steer_positions: str = field(
        default="all", metadata={"help": "Which tokens: 'all', 'last', 'f7+l7', 'prompt' or 'completion'."}
    )
    steer_target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of the blocks to steer (suffixes or a regular expression)."}
    )
    steer_exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of blocks not to steer (suffixes or a regular expression)."}
    )
    steer_layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks to steer, in their stack."}
    )
    steer_layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "With steer_layers_to_transform: name of the stack the indices refer to."}
    )
    steer_rank_pattern: dict = field(
        default_factory=dict, metadata={"help": "Ranks by name of the steered module, where they differ from steer_r."}
    )
    steer_init_weights: bool = field(
        default=True, metadata={"help": "True: start at dh = 0. False: start at random (tests)."}
    )
    orthogonal: str | None = field(
        default=None,
        metadata={"help": "Keep W_down orthogonal to lora_B of the MLP's output: 'always', 'periodic' or 'none'."},
    )
    orthogonal_interval: int | None = field(
        default=None, metadata={"help": "With orthogonal='periodic': optimizer steps between projections."}
    )
    steer_hidden_size: int | None = field(default=None, metadata={"help": "Recorded: width of the model."})
    steer_num_blocks: int | None = field(default=None, metadata={"help": "Recorded: number of blocks of the model."})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = JOINT_STEER_LORA
        self._made_for = (self.steer_hidden_size, self.steer_num_blocks)
        self.steer_activation = self.steer_config().activation
        self._check_site()
        self._check_orthogonal()
        for name, reason in {
            "megatron_config": "its modules are not those of a transformers block",
            "alora_invocation_tokens": "aLoRA acts on some tokens only, steering on all of them",
            "arrow_config": "Arrow routes tokens through other LoRA adapters, without their steering",
        }.items():
            if getattr(self, name) is not None:
                raise ValueError(f"`{name}` cannot be combined with steering: {reason}. Use `LoraConfig` for it.")

    def _check_site(self) -> None:
        if "heads" in self.steer_config().sites:
            raise ValueError(
                "`steer_site='heads'`: joint adapters steer the hidden states that LoRA writes to. Use another "
                "`steer_site`, or a `SteerConfig` beside a `LoraConfig`."
            )

    def _check_orthogonal(self) -> None:
        if self.orthogonal is not None and self.orthogonal not in ORTHOGONAL:
            allowed = ", ".join(map(repr, ORTHOGONAL))
            raise ValueError(f"`orthogonal={self.orthogonal!r}` is unknown; choose one of {allowed}.")
        interval = self.orthogonal_interval
        if (self.orthogonal == "periodic") != (interval is not None):
            raise ValueError(
                f"`orthogonal_interval={interval!r}` contradicts `orthogonal={self.orthogonal!r}`: "
                "set it with `orthogonal='periodic'` and only then."
            )
        if interval is not None and (isinstance(interval, bool) or not isinstance(interval, int) or interval < 1):
            raise ValueError(f"`orthogonal_interval={interval!r}` must be an integer of at least 1.")
        if self.orthogonal not in ("always", "periodic"):
            return
        sites = self.steer_config().sites
        unsuited = {
            "steer_kind": (
                self.steer_kind not in ("linear", "nonlinear"),
                "only 'linear' and 'nonlinear' have a `W_down`",
            ),
            "steer_site": ("attention" in sites, "what is edited there is not what the MLP writes"),
            "target_parameters": (bool(self.target_parameters), "no single linear layer returns the experts' output"),
        }
        for name, (wrong, reason) in unsuited.items():
            if wrong:
                raise ValueError(
                    f"`orthogonal={self.orthogonal!r}` contradicts `{name}={getattr(self, name)!r}`: {reason}. "
                    "Set `orthogonal='none'`."
                )

    @property
    def constrained(self) -> bool:
        """Whether the edits are kept orthogonal to `lora_B`, in the blocks where they can be."""
        return (
            self.orthogonal != "none"
            and self.steer_kind in ("linear", "nonlinear")
            and "attention" not in self.steer_config().sites
            and not self.target_parameters
        )

    def steer_config(self) -> SteerConfig:
        """The steering half alone.

        Raises:
            ValueError: if it is no valid [`SteerConfig`]; the message names the prefixed fields.
        """
        with prefixed_errors():
            config = SteerConfig(
                **{name: getattr(self, f"steer_{name}") for name in _STEER_FIELDS},
                task_type=self.task_type,
                peft_version=self.peft_version,
                base_model_name_or_path=self.base_model_name_or_path,
                revision=self.revision,
                inference_mode=self.inference_mode,
            )
        config._made_for = self._made_for
        return config


@contextmanager
def prefixed_errors() -> Iterator[None]:
    """Errors about the fields of a [`SteerConfig`] name the fields of [`JointSteerLoraConfig`] instead."""
    try:
        yield
    except ValueError as error:
        message = re.sub(rf"(?<![\w'])({'|'.join(_STEER_FIELDS)})(?=[=`\[])", r"steer_\1", str(error))
        raise ValueError(message) from error
