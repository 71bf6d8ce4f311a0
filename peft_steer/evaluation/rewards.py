"""A task's own metric, after its own filters, as a reward for TRL's `GRPOTrainer`."""

from collections.abc import Callable
from functools import cache
from typing import Any

from lm_eval.api.task import ConfigurableTask
from lm_eval.models.utils import postprocess_generated_text

from peft_steer.utils.errors import UsageError, suggest

from .tasks import docs_of, filtered, target_of


def reward_function(task: ConfigurableTask, metric: str | None = None) -> Callable[..., list[float]]:
    """The task's own metric as a reward function for `GRPOTrainer`, for the rows of
    [`~peft_steer.evaluation.datasets.grpo_dataset`].

    A completion is cut where the harness would stop generating, passes the task's filter, and is scored as the harness
    scores a document. (The trainer's rollout goes on to its end all the same, and what comes after the cut shares the
    advantage: keep `max_completion_length` near the length of an answer, or use chat prompts, whose answers end.)

    Args:
        task: A task that generates (`output_type: generate_until`).
        metric: `"metric,filter"` as the harness prints it, such as `"exact_match,strict-match"`; by default the
            first metric after the first filter.

    Raises:
        UsageError: If the task generates nothing, or has no such metric, or it is not a number for each document of
            which more is better.
    """

    @cache
    def docs(split: str) -> list[dict]:
        return docs_of(task, split, ("generate_until",))

    first = docs("train")[0]
    scores = _scores(task, first, target_of(task, first))
    metric = metric or next(iter(scores))
    if metric not in scores:
        raise UsageError(
            f"reward metric {metric!r} is not a metric of task {task.config.task!r}{suggest(metric, scores)}"
        )
    if not isinstance(scores[metric], (bool, int, float)):
        raise UsageError(
            f"reward metric {metric!r} of task {task.config.task!r} gives {scores[metric]!r}, not a number"
        )
    if not task.higher_is_better().get(metric.split(",")[0], True):
        raise UsageError(
            f"reward metric {metric!r} of task {task.config.task!r}: less is better, so it cannot be a reward"
        )

    def reward(completions: list, split: list[str], doc_id: list[int], **_: Any) -> list[float]:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        return [
            float(_scores(task, docs(name)[i], text)[metric])
            for text, name, i in zip(texts, split, doc_id, strict=True)
        ]

    reward.__name__ = metric  # the trainer logs it as `rewards/NAME/mean`
    return reward


def _scores(task: ConfigurableTask, doc: dict, generation: str) -> dict[str, Any]:
    """Every metric after every filter, as `{"metric,filter": value}`."""
    text = postprocess_generated_text(generation, task.config.generation_kwargs.get("until"), think_end_token=None)
    return {
        f"{name},{filter_name}": value
        for filter_name, result in filtered(task, doc, text).items()
        for name, value in task.process_results(doc, [result]).items()
    }
