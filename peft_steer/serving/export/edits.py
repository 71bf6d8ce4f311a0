"""The edits of a loaded adapter, one for each steered place, and what no export can express."""

from dataclasses import dataclass

from peft import PeftConfig, PeftModel, PeftType
from torch import nn

from peft_steer.interventions.base import Intervention
from peft_steer.sites import Block
from peft_steer.tuners.steer.config import SteerConfig
from peft_steer.tuners.steer.injection import resolve_sites
from peft_steer.tuners.steer.layer import CHILD, INPUT_CHILD


@dataclass(frozen=True)
class Edit:
    """One edit: `h + scale * dh` at `site` of `block`.

    Attributes:
        name: The steered module's, in the base.
        block: Its block.
        site: `"block"`, `"mlp"`, `"attention"` or `"heads"`.
        module: The intervention, which has `dh`.
        scale: The strength at which it acts now.
    """

    name: str
    block: Block
    site: str
    module: Intervention
    scale: float


def edits_of(model: PeftModel, adapter_name: str = "default") -> list[Edit]:
    """The edits of an adapter, in the order of the blocks.

    Raises:
        ValueError: If not all of it is an edit of every token: LoRA, `modules_to_save`, `positions`.
    """
    config = steer_config(model, adapter_name)
    base = model.get_base_model()
    edits = []
    for name, site in resolve_sites(base, config).items():
        layer = getattr(site.module, INPUT_CHILD if site.place == "heads" else CHILD)
        edits.append(Edit(name, site.block, site.place, layer.steer_edit[adapter_name], layer.strength(adapter_name)))
    return edits


def steer_config(model: PeftModel, adapter_name: str = "default") -> SteerConfig:
    """The adapter's configuration, if every part of it is an edit of every token.

    Raises:
        ValueError: If not.
    """
    if adapter_name not in model.peft_config:
        raise ValueError(f"adapter_name: there is no adapter {adapter_name!r}, there are {list(model.peft_config)}")
    return check_config(model.peft_config[adapter_name])


def check_config(config: PeftConfig) -> SteerConfig:
    """The configuration, if every part of the adapter is an edit of every token: what any format needs.

    Raises:
        ValueError: If not.
    """
    if not isinstance(config, SteerConfig):
        raise ValueError(
            f"the adapter is of type {PeftType(config.peft_type).value}, and only steering adapters (STEER) can be "
            "exported. An ordinary LoRA adapter needs no export; a joint adapter is LoRA and steering together, for "
            "which no other engine has a file. vLLM with peft-steer's plugin serves it."
        )
    if config.positions != "all":
        raise ValueError(
            f"the adapter has positions={config.positions!r}, and an exported file edits every token. Serve it with "
            "transformers, or train with positions='all'."
        )
    if config.modules_to_save:
        raise ValueError(
            f"the adapter has modules_to_save={sorted(config.modules_to_save)}, whole modules that the exported file "
            "has no place for. Train without them."
        )
    return config


def who_runs_it(config: SteerConfig) -> str:
    """The end of a refusal: what runs the adapter as it is."""
    return (
        "transformers with PEFT runs it as it is."
        if "heads" in config.sites
        else "vLLM with peft-steer's plugin serves it."
    )


def check_on_cpu_or_gpu(module: nn.Module, name: str) -> None:
    """Raises `ValueError` if `module` has no values: a base that was made on the meta device."""
    if any(p.is_meta for p in module.parameters()):
        raise ValueError(f"the base's weights at {name!r} are not loaded, and this export computes with them")
