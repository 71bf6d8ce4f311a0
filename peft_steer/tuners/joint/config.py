"""`JointSteerLoraConfig`: LoRA's configuration with the steering fields, under the prefix `steer_`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import Field, dataclass, field, fields, make_dataclass
from typing import Any

from peft import LoraConfig
from peft.config import PeftConfig

from peft_steer.interventions import KINDS, LowRank
from peft_steer.interventions.options import check_count
from peft_steer.registration import add_peft_type

from ..steer.config import SteerConfig
from ..steer.files import check_same


JOINT_STEER_LORA = add_peft_type("JOINT_STEER_LORA")
ORTHOGONAL = ("always", "periodic", "none")


def _steering_fields() -> list[Field[Any]]:
    """The fields of [`SteerConfig`] that a joint adapter has too: not those of every PEFT configuration, which it
    shares with LoRA, nor those of edits of attention heads, which it cannot have."""
    shared = {f.name for f in fields(PeftConfig)} | {f.name for f in fields(LoraConfig)} - {
        # LoRA has fields of these names with another meaning.
        "r", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern"
    } - {"init_weights"}  # fmt: skip
    heads = {name for cls in KINDS.values() if cls.edits_heads for name in cls.options}
    return [f for f in fields(SteerConfig) if f.name not in shared | heads]


STEERING = {f"steer_{f.name}": f for f in _steering_fields()}


def _prefixed(f: Field[Any]) -> Any:
    default = "nonlinear" if f.name == "kind" else f.default
    metadata = {"help": f"Steering: {f.metadata['help']}"}
    if callable(f.default_factory):
        return field(default_factory=f.default_factory, metadata=metadata)
    return field(default=default, metadata=metadata)


_SteeringHalf: Any = make_dataclass("_SteeringHalf", [(name, f.type, _prefixed(f)) for name, f in STEERING.items()])


@dataclass
class JointSteerLoraConfig(_SteeringHalf, LoraConfig):  # type: ignore[misc]  # its fields are made of SteerConfig's
    """
    This is the configuration class to store the configuration of a [`JointSteerLoraModel`]: LoRA and steering trained
    together in one adapter ("Weight Updates as Activation Shifts", arXiv 2603.00425, joint adaptation). All of
    [`~peft.LoraConfig`]'s fields keep their meaning; what follows is added.

    Args:
        steer_site, steer_kind, steer_r, steer_activation, steer_use_bias, steer_scale, steer_positions,
        steer_share_weights, steer_target_modules, steer_exclude_modules, steer_layers_to_transform,
        steer_layers_pattern, steer_rank_pattern, steer_init_weights, steer_hidden_size, steer_num_blocks:
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
    """

    orthogonal: str | None = field(
        default=None,
        metadata={"help": "Keep W_down orthogonal to lora_B of the MLP's output: 'always', 'periodic' or 'none'."},
    )
    orthogonal_interval: int | None = field(
        default=None, metadata={"help": "With orthogonal='periodic': optimizer steps between projections."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]  # PEFT's
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
        rho: float = getattr(self.eva_config, "rho", 1.0)
        if rho > 1:
            raise ValueError(
                f"`eva_config` has rho={rho}: EVA would give layers other ranks, and take LoRA from "
                "some, after the adapter is made; but steering follows the LoRA layers as they were made. Set "
                "`eva_config=EvaConfig(rho=1.0)`."
            )

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
        if interval is not None:
            check_count("orthogonal_interval", interval)
        if self.orthogonal not in ("always", "periodic"):
            return
        steer = self.steer_config()
        unsuited = {
            "steer_kind": (
                not issubclass(steer.intervention, LowRank),
                "only 'linear' and 'nonlinear' have a `W_down`",
            ),
            "steer_site": ("attention" in steer.sites, "what is edited there is not what the MLP writes"),
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
        steer = self.steer_config()
        return (
            self.orthogonal != "none"
            and issubclass(steer.intervention, LowRank)
            and "attention" not in steer.sites
            and not self.target_parameters
        )

    def check_file(self, loaded: PeftConfig, adapter_name: str, path: str) -> None:
        """Raise `ValueError` if `loaded`, the configuration of a file, is not that of this adapter."""
        names = [name for name in STEERING if name != "steer_init_weights"]
        names += ["orthogonal", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"]
        check_same(self, loaded, [*names, "target_modules"], adapter_name, path)

    def steer_config(self) -> SteerConfig:
        """The steering half alone.

        Raises:
            ValueError: if it is not a valid [`SteerConfig`].
        """
        with of_steering_half():
            config = SteerConfig(
                **{f.name: getattr(self, name) for name, f in STEERING.items()},
                task_type=self.task_type,
                peft_version=self.peft_version,
                base_model_name_or_path=self.base_model_name_or_path,
                revision=self.revision,
                inference_mode=self.inference_mode,
            )
        config._made_for = self._made_for
        return config


@contextmanager
def of_steering_half() -> Iterator[None]:
    """Errors about the fields of a [`SteerConfig`] say that they have a prefix here."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Steering half (its fields begin with `steer_`): {error}") from error
