"""The model card of a trained adapter: what it is, what it was trained on, how it went, how to load it."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import Trainer

import peft_steer


_TEMPLATE = Path(__file__).with_name("card_template.md")
_LOGGED = ("loss", "reward", "eval_loss", "eval_reward", "mean_token_accuracy", "rewards/accuracies")


def make_card(trainer: Trainer, trainer_name: str, base: str, data: str) -> ModelCard:
    """A card for the adapter (or the model) that `trainer` has trained.

    Args:
        trainer: after `train()`.
        trainer_name: `"sft"`, `"grpo"` or `"dpo"`.
        base: which weights were adapted, a hub id or a description.
        data: the task or the data set.
    """
    configs = getattr(trainer.model, "peft_config", {})  # a PeftModel has it, a fully trained model has not
    config = next(iter(configs.values()), None)
    on_hub = not Path(base).exists()
    card_data = ModelCardData(
        library_name="peft" if config else "transformers",
        base_model=base if on_hub else None,
        pipeline_tag="text-generation",
        tags=["peft-steer", "trl", trainer_name, *_adapter_tags(config, base if on_hub else None)],
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(_TEMPLATE),
        name=trainer.hub_model_id or Path(str(trainer.args.output_dir)).name,
        adapter_id=trainer.hub_model_id or trainer.args.output_dir,
        base=base,
        base_id=config.base_model_name_or_path if config else None,
        method=_method(config) if config else "full fine-tuning",
        trainer=trainer_name.upper(),
        data=data,
        steps=trainer.state.global_step,
        metrics=last_metrics(trainer.state.log_history),
        version=peft_steer.__version__,
        is_adapter=config is not None,
    )


def _adapter_tags(config: Any, hub_id: str | None) -> list[str]:
    """What the hub finds an adapter by: its type, and the base that it belongs to."""
    if config is None:
        return []
    kind = str(getattr(config.peft_type, "value", config.peft_type)).lower().replace("_", "-")
    return [kind, *([f"base_model:adapter:{hub_id}"] if hub_id else [])]


def last_metrics(log_history: list[dict[str, Any]]) -> dict[str, float]:
    """The last logged value of each metric that tells how a training went."""
    logged: dict[str, float] = {}
    for entry in log_history:
        logged |= {name: entry[name] for name in _LOGGED if name in entry}
    return logged


def _method(config: Any) -> str:
    names = ("site", "kind", "r", "lora_alpha", "steer_site", "steer_kind", "steer_r", "orthogonal", "positions")
    values = config.to_dict()
    shown = ", ".join(f"{name}={values[name]!r}" for name in names if name in values)
    return f"{getattr(config.peft_type, 'value', config.peft_type)} ({shown})"
