"""What the three training commands share: from checked arguments to a saved adapter."""

import json
import logging
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer, EarlyStoppingCallback, PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import get_last_checkpoint
from trl import get_dataset, get_quantization_config
from trl.trainer.utils import create_model_from_path

from peft_steer import JointOptimizer, MarkCompletions, needs_prompts
from peft_steer.evaluation import tasks
from peft_steer.utils.errors import UsageError, usage_errors
from peft_steer.utils.hub import Source, find_model

from .arguments import Arguments, parse
from .card import make_card
from .preflight import preflight


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command:
    """One of the training commands.

    Attributes:
        name: `"sft"`, `"grpo"` or `"dpo"`.
        script_cls, training_cls, trainer_cls: TRL's.
        prepare: makes the trainer's data, and what else only this trainer takes, from `(arguments, task, tokenizer)`,
            before the model is loaded.
    """

    name: str
    script_cls: type
    training_cls: type
    trainer_cls: type[Trainer]
    prepare: Callable[[Arguments, Any, PreTrainedTokenizerBase], dict[str, Any]]

    def run(self, argv: list[str]) -> int:
        """Parses, checks, trains, saves. Returns 0.

        Raises:
            UsageError: If the arguments cannot be used as given, before the model is loaded.
        """
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
        logging.getLogger("peft_steer").setLevel(logging.INFO)
        arguments = parse(argv, f"peft-steer {self.name}", self.script_cls, self.training_cls)
        source, adapter = _checked(arguments)
        tokenizer = _tokenizer(arguments, source)
        prepared = self.prepare(arguments, _task(arguments), tokenizer)
        trainer = _make(self.trainer_cls, arguments, source, adapter, prepared)
        _train(trainer, arguments)
        _save(trainer, arguments, self.name, source)
        return 0


def _checked(arguments: Arguments) -> tuple[Source, str | None]:
    """Where the base is and, if one goes on, the adapter: all that can be wrong before anything is loaded."""
    training, task = arguments.training, arguments.task
    training.resume_from_checkpoint = _checkpoint(training.resume_from_checkpoint, training.output_dir)
    if task.early_stopping_patience is not None and not training.load_best_model_at_end:
        raise UsageError(
            "early_stopping_patience: needs `load_best_model_at_end: true`, and `eval_strategy` and `save_strategy` "
            "other than 'no'"
        )
    base, adapter = arguments.model.model_name_or_path, task.adapter_name_or_path
    if adapter is not None:
        base = arguments.model.model_name_or_path = _base_of(adapter, base)
    if base is None:
        raise UsageError("model_name_or_path: is missing")
    return find_model(base), adapter


def _checkpoint(resume: str | bool | None, output_dir: str) -> str | None:
    name = str(resume).lower()
    if name in ("none", "false"):
        return None
    if name == "true":
        resume = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
        if resume is None:
            raise UsageError(f"resume_from_checkpoint: there is no checkpoint in {output_dir!r}")
    if not Path(str(resume)).is_dir():
        raise UsageError(f"resume_from_checkpoint: there is no directory {resume!r}")
    return str(resume)


def _base_of(adapter: str, base: str | None) -> str:
    config = Path(adapter) / "adapter_config.json"
    if Path(adapter).is_dir() and not config.is_file():
        raise UsageError(f"adapter_name_or_path: {adapter!r} has no adapter_config.json, so it is not an adapter")
    with usage_errors("adapter_name_or_path: "):
        recorded = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if recorded is None and base is None:
        raise UsageError(f"adapter_name_or_path: {adapter!r} names no base; set `model_name_or_path`")
    if recorded is not None and base is not None and find_model(base).path != find_model(recorded).path:
        raise UsageError(
            f"model_name_or_path: {base!r} is not {recorded!r}, the base that the adapter {adapter!r} was made for. "
            "Leave it out to take the adapter's, or, if the weights are the same, change `base_model_name_or_path` in "
            "its adapter_config.json."
        )
    return base or recorded


def _task(arguments: Arguments) -> Any:
    task = arguments.task
    if task.task is None:
        return None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its hints are for people who write tasks
    metadata: Any = task.metadata  # parsed by now
    return tasks.load_task(task.task, task.include_path, task.num_fewshot, metadata)[0]


def task_datasets(arguments: Arguments, make: Callable[..., datasets.Dataset]) -> dict[str, datasets.Dataset | None]:
    """The trainer's `train_dataset` and `eval_dataset`: from the task by `make(split)`, or as TRL's scripts load
    them."""
    watched = arguments.training.eval_strategy != "no"
    if arguments.task.task is not None:
        return {"train_dataset": make("train"), "eval_dataset": make("validation") if watched else None}
    script = arguments.script
    with usage_errors():
        if arguments.mixture.datasets:
            data = get_dataset(arguments.mixture)
        else:
            data = _load_dataset(script.dataset_name, script.dataset_config, script.dataset_streaming)
    for split in (script.dataset_train_split, *([script.dataset_test_split] if watched else [])):
        if split not in data:
            raise UsageError(
                f"the data have no split {split!r}, only {list(data)}: set `dataset_train_split`, "
                "`dataset_test_split` (or, for `datasets`, `test_split_size`)"
            )
    return {
        "train_dataset": data[script.dataset_train_split],
        "eval_dataset": data[script.dataset_test_split] if watched else None,
    }


def _load_dataset(name: str, config: str | None, streaming: bool) -> datasets.DatasetDict:
    files = Path(name)
    if files.is_file():  # a local file by its name, beside what `load_dataset` takes
        kind = {"jsonl": "json", "txt": "text"}.get(files.suffix[1:], files.suffix[1:])
        return datasets.load_dataset(kind, data_files=name, streaming=streaming)
    return datasets.load_dataset(name, name=config, streaming=streaming)


def _tokenizer(arguments: Arguments, source: Source) -> PreTrainedTokenizerBase:
    options = {"revision": arguments.model.model_revision, "trust_remote_code": arguments.training.trust_remote_code}
    with usage_errors("model_name_or_path: "):
        return AutoTokenizer.from_pretrained(source.path, **options)


def _make(
    trainer_cls: type[Trainer], arguments: Arguments, source: Source, adapter: str | None, prepared: dict[str, Any]
) -> Trainer:
    training, model_args = arguments.training, arguments.model
    training.dataloader_pin_memory &= torch.accelerator.is_available()  # else torch warns that it is of no use
    model_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training.model_init_kwargs or {}),
    }
    quantization = get_quantization_config(model_args)
    if adapter is None:
        training.model_init_kwargs = model_kwargs
        model: dict[str, Any] = {
            "model": source.path,
            "quantization_config": quantization,
            "peft_config": arguments.peft_config,
        }
    else:
        base = create_model_from_path(source.path, quantization_config=quantization, **model_kwargs)
        model = {"model": PeftModel.from_pretrained(base, adapter, is_trainable=True)}
    patience = arguments.task.early_stopping_patience
    callbacks: Any = None if patience is None else [EarlyStoppingCallback(patience)]
    trainer: Any = trainer_cls(args=training, callbacks=callbacks, **model, **prepared)
    if training.label_smoothing_factor and needs_prompts(trainer.model):
        trainer.data_collator = MarkCompletions(trainer.data_collator)
    for config in getattr(trainer.model, "peft_config", {}).values():  # the whole model has none
        if not Path(str(model_args.model_name_or_path)).exists():
            config.base_model_name_or_path = model_args.model_name_or_path  # the hub id, not where it lies here
    if arguments.script.ignore_bias_buffers:  # as TRL's DPO script
        ignored = [name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool]
        trainer.model._ddp_params_and_buffers_to_ignore = ignored
    _report_dropped(trainer, prepared["train_dataset"])
    if arguments.steer_learning_rate is not None:
        trainer.optimizer_cls_and_kwargs = JointOptimizer.as_in(
            training, trainer.model, lora_lr=training.learning_rate, steer_lr=arguments.steer_learning_rate
        )
    return trainer


def _report_dropped(trainer: Any, given: Any) -> None:
    """TRL leaves out, silently, what `max_length` cuts before the first token to learn."""
    if not isinstance(given, datasets.Dataset) or getattr(trainer.args, "packing", False):
        return
    left = len(trainer.train_dataset)
    if left == 0:
        raise UsageError("max_length: no example has a token to learn within it; raise it")
    if left < len(given):
        logger.warning(
            "%d of %d examples are left out: `max_length` cuts their answers.", len(given) - left, len(given)
        )


def _train(trainer: Any, arguments: Arguments) -> None:
    row = next(iter(trainer.train_dataset))
    if trainer.accelerator.is_main_process:
        preflight(trainer, _text(row, trainer.processing_class))
    trainer.accelerator.wait_for_everyone()
    try:
        trainer.train(resume_from_checkpoint=arguments.training.resume_from_checkpoint)
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            "Out of memory. In the order of what it costs: a smaller `per_device_train_batch_size` with as many more "
            "`gradient_accumulation_steps`, `gradient_checkpointing: true`, a smaller `max_length` (or "
            "`max_completion_length`), `load_in_4bit: true`."
        ) from error


def _text(row: dict[str, Any], tokenizer: Any) -> str:
    if "input_ids" in row:
        return tokenizer.decode(row["input_ids"])
    return str(row.get("prompt", row.get("text", row.get("messages"))))


def _save(trainer: Any, arguments: Arguments, name: str, source: Source) -> None:
    training = arguments.training
    trainer.save_model(training.output_dir)
    mixture = [data.path for data in arguments.mixture.datasets]
    data = arguments.task.task or (", ".join(mixture) if mixture else arguments.script.dataset_name)
    card = make_card(trainer, name, str(arguments.model.model_name_or_path), source, str(data))
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=arguments.script.dataset_name)  # with TRL's card, which cannot load ours
    if trainer.accelerator.is_main_process:
        card.save(Path(training.output_dir) / "README.md")
        if training.push_to_hub:
            card.push_to_hub(trainer.hub_model_id, token=training.hub_token, revision=training.hub_revision)
    command = evaluation(arguments, source)
    trainer.accelerator.print(f"Saved to {training.output_dir}. To evaluate it:\n  {command}")
    trainer.end()  # the trackers, the process group


def evaluation(arguments: Arguments, source: Source) -> str:
    """The command that scores what was trained, on the base and the prompts of the training."""
    task, model, out = arguments.task, arguments.model, arguments.training.output_dir
    adapter = arguments.peft_config is not None or task.adapter_name_or_path is not None
    values = {"pretrained": source.path, "peft": out} if adapter else {"pretrained": out}
    values |= {"load_in_8bit": True} if model.load_in_8bit else {}
    if model.load_in_4bit:
        values |= {"load_in_4bit": True, "bnb_4bit_compute_dtype": model.dtype}
        values |= {"bnb_4bit_quant_type": model.bnb_4bit_quant_type}
        values |= {"bnb_4bit_use_double_quant": model.use_bnb_nested_quant}
    values |= {"dtype": model.dtype, "tokenizer": out}
    words = ["peft-steer", "lm-eval", "--model", "peft-steer"]
    words += ["--model_args", ",".join(f"{name}={value}" for name, value in values.items())]
    words += ["--tasks", task.task or "TASK"]
    for name in ("include_path", "num_fewshot", "system_instruction"):
        value = getattr(task, name)
        words += [] if value is None else [f"--{name}", str(value)]
    words += [] if task.metadata is None else ["--metadata", json.dumps(task.metadata)]
    return shlex.join(words + (["--apply_chat_template"] if task.apply_chat_template else []))
