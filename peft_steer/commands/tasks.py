"""`peft-steer tasks`: the tasks that ship, or one of them with a document of its data. All of it is in their YAML
files."""

import argparse
import json
import logging
import textwrap
from typing import Any

from lm_eval.tasks import TaskManager

from peft_steer.evaluation.tasks import OUR_TASKS, docs_of, load_task, pair_of
from peft_steer.utils.errors import UsageError, suggest


SPLITS = ("train", "validation", "test")
_HEADER = ("task", " / ".join(SPLITS), "output type", "licence of the data", "source")
_DESCRIPTION = {"version", "splits", "license", "source", "path", "name"}  # the rest of `metadata` are parameters


def run(args: argparse.Namespace) -> int:
    """Prints the table, or one task.

    Raises:
        UsageError: If there is no such task.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its hints are for people who write tasks
    folders = [str(OUR_TASKS), *([str(args.include_path)] if args.include_path else [])]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if args.name is None:
        print(_table(manager))
    elif args.name in manager.all_subtasks:
        print(_details(manager, args.name, args))
    elif args.name in manager.all_groups:
        print(f"{args.name}: a group of {', '.join(_config(manager, args.name)['task'])}")
    else:
        raise UsageError(f"there is no task {args.name!r}{suggest(args.name, manager.all_tasks)}")
    return 0


def _config(manager: TaskManager, name: str) -> dict[str, Any]:
    """A task's file with what it includes; functions are names."""
    return manager.task_index[name].cfg


def _table(manager: TaskManager) -> str:
    rows = [_HEADER, *(_row(name, _config(manager, name)) for name in manager.all_subtasks)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    groups = [f"{name}: {', '.join(_config(manager, name)['task'])}" for name in manager.all_groups]
    return "\n".join([*lines, "", "Groups:", *groups, "", "`peft-steer tasks NAME` shows one, with a prompt."])


def _row(name: str, config: dict[str, Any]) -> tuple[str, ...]:
    metadata = config.get("metadata") or {}
    return name, _sizes(metadata), config.get("output_type", "–"), metadata.get("license", "–"), _source(config)


def _sizes(metadata: dict[str, Any]) -> str:
    sizes = metadata.get("splits") or {split: metadata.get(f"n_{split}") for split in SPLITS}
    return " / ".join(f"{sizes[split]:,}" if sizes.get(split) else "–" for split in SPLITS)


def _source(config: dict[str, Any]) -> str:
    metadata = config.get("metadata") or {}
    path = metadata.get("path") or config.get("dataset_path")
    name = metadata.get("name") or config.get("dataset_name")
    return metadata.get("source") or (f"{path} ({name})" if name else path or "–")


def _details(manager: TaskManager, name: str, arguments: argparse.Namespace) -> str:
    config, file = _config(manager, name), manager.task_index[name].yaml_path
    metadata = {**(config.get("metadata") or {}), **(arguments.metadata or {})}
    parameters = {key: value for key, value in metadata.items() if key not in _DESCRIPTION}
    facts = dict(zip(_HEADER, _row(name, {**config, "metadata": metadata}), strict=True))
    facts |= {
        "metrics": ", ".join(metric["metric"] for metric in config.get("metric_list") or []),
        "version": str(metadata.get("version", "–")),
        "parameters": json.dumps(parameters),
        "file": str(file),
        "to read": ", ".join(str(path) for path in sorted(file.parent.glob("README.md"))) or "–",
    }
    width = max(map(len, facts))
    lines = [f"{key.ljust(width)}  {value}" for key, value in facts.items()]
    return "\n".join([*lines, "", _sample(name, arguments)])


def _sample(name: str, arguments: argparse.Namespace) -> str:
    """The sizes of the data here, and their first training document as a prompt and its answer."""
    include_path = arguments.include_path and str(arguments.include_path)
    try:
        task, _ = load_task(name, include_path, metadata=arguments.metadata)
        prompt, answer = pair_of(task, docs_of(task, "train", ("multiple_choice", "generate_until"))[0])
    except (OSError, ValueError, ImportError) as error:
        return f"No example: {error}"
    docs = {"train": task.training_docs(), "validation": task.validation_docs(), "test": task.test_docs()}
    sizes = " / ".join(f"{len(docs[split]):,}" if docs[split] is not None else "–" for split in SPLITS)
    return "\n".join([f"Loaded: {sizes}. The first prompt:", _indented(prompt), "Its answer:", _indented(answer)])


def _indented(text: str) -> str:
    return textwrap.indent(text, "  | ", lambda line: True)
