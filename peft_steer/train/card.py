"""The model card of a trained adapter: what it is, what it was trained on, how it went, how to load it."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import Trainer

import peft_steer
from peft_steer.utils.hub import Source


_TEMPLATE = Path(__file__).with_name("card_template.md")
_LOGGED = ("loss", "reward", "mean_token_accuracy", "rewards/accuracies")
_EVALUATED = tuple(f"eval_{name}" for name in _LOGGED)
_LICENCE = ("license", "license_name", "license_link")


def make_card(trainer: Trainer, trainer_name: str, model: str, source: Source, data: str) -> ModelCard:
    """A card for the adapter (or the model) that `trainer` has trained.

    Args:
        trainer: after `train()`.
        trainer_name: `"sft"`, `"grpo"` or `"dpo"`.
        model: the base as the user named it, a hub id or a directory.
        source: where its weights came from.
        data: the task or the data set.
    """
    configs = getattr(trainer.model, "peft_config", {})  # a PeftModel has it, a fully trained model has not
    config = next(iter(configs.values()), None)
    hub_id = None if Path(model).exists() else model
    name = trainer.hub_model_id or Path(str(trainer.args.output_dir)).name
    metrics = last_metrics(trainer.state.log_history)
    card_data = ModelCardData(
        library_name="peft" if config else "transformers",
        base_model=hub_id,
        pipeline_tag="text-generation",
        tags=["peft-steer", "trl", trainer_name, *_adapter_tags(config, hub_id)],
        model_name=name,
        eval_results=_evaluated(metrics, data) or None,  # None: the card has no `model-index`
        **_licence(source.path),
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(_TEMPLATE),
        name=name,
        adapter_id=trainer.hub_model_id or trainer.args.output_dir,
        base=source.label,
        base_id=config.base_model_name_or_path if config else None,
        method=_method(config) if config else "full fine-tuning",
        trainer=trainer_name.upper(),
        data=f"`{data}`",
        steps=trainer.state.global_step,
        metrics=metrics,
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
        logged |= {name: entry[name] for name in (*_LOGGED, *_EVALUATED) if name in entry}
    return logged


def _evaluated(metrics: dict[str, float], data: str) -> list[EvalResult]:
    """What the trainer measured on held-out data, for the hub's `model-index`; empty if it did not evaluate."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=data,
            dataset_name=data,
            metric_type=name.removeprefix("eval_"),
            metric_value=value,
        )
        for name, value in metrics.items()
        if name in _EVALUATED
    ]


def _licence(base: str) -> dict[str, Any]:
    """The base's licence as its own card, or else its config, states it; empty if neither does or can be read.

    Args:
        base: a directory or a hub id.
    """
    for file in ("README.md", "config.json"):
        path = Path(base) / file
        if not Path(base).is_dir():
            try:
                path = Path(hf_hub_download(base, file))
            except (EntryNotFoundError, OSError):
                continue  # offline and not in the cache, or there is none
        if not path.is_file():
            continue
        if file == "README.md":
            stated = ModelCard.load(path).data.to_dict()
        else:
            stated = json.loads(path.read_text(encoding="utf-8"))
        if "license" in stated:
            return {name: stated[name] for name in _LICENCE if name in stated}
    return {}


def _method(config: Any) -> str:
    names = ("site", "kind", "r", "lora_alpha", "steer_site", "steer_kind", "steer_r", "orthogonal", "positions")
    values = config.to_dict()
    shown = ", ".join(f"{name}={values[name]!r}" for name in names if name in values)
    return f"{getattr(config.peft_type, 'value', config.peft_type)} ({shown})"
