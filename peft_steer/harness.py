"""lm-evaluation-harness's own command line, with our tuner types registered and our tasks on its path."""

import sys
from typing import Any

import lm_eval.tasks
from lm_eval.__main__ import cli_evaluate

import lm_eval_tasks.model  # noqa: F401  (registers the model `peft-steer`, and the tuner types with it)
from peft_steer.tasks import OUR_TASKS


class _TaskManager(lm_eval.tasks.TaskManager):
    """Adds our tasks to whatever `--include_path` names: lm-eval's command line takes one path only."""

    def __init__(self, *args: Any, include_path: str | None = None, **kwargs: Any) -> None:
        paths = [str(OUR_TASKS), *([include_path] if include_path else [])]
        super().__init__(*args, include_path=paths, **kwargs)


def main(argv: list[str]) -> int:
    """Runs `peft-steer lm-eval`. All arguments are lm-eval's."""
    lm_eval.tasks.TaskManager = _TaskManager  # where the subcommands run, ls and validate import it from
    sys.argv = ["peft-steer lm-eval", *argv]
    cli_evaluate()
    return 0
