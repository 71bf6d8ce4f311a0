"""What the training leaves of other abilities: the scores of other tasks, to be compared with the untrained base's."""

from collections.abc import Iterator
from typing import Any

from lm_eval.api.model import LM

from peft_steer.evaluation.scoring import score
from peft_steer.evaluation.tasks import load_tasks


def kept(harness: LM, entries: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Scores each entry's task, or all tasks of its group (MMLU, BBH) as one: the mean over all their items.

    Args:
        harness: The trained model, as lm-eval knows it.
        entries: `name`, `limit` (documents of each task, None for all) and `metadata` of each.

    Yields:
        Its name, and what `score` returns: `items` of a group are named `TASK:HASH`.
    """
    for entry in entries:
        name = entry["name"]
        scores = {
            task.config.task: score(harness, task, entry["limit"]) for task in load_tasks(name, entry["metadata"])
        }
        if list(scores) == [name]:
            yield name, scores[name]
            continue
        ids = [f"{task}:{item}" for task, scored in scores.items() for item in scored["items"]["ids"]]
        values = [value for scored in scores.values() for value in scored["items"]["scores"]]
        metric = " and ".join(dict.fromkeys(scored["metric"] for scored in scores.values()))
        joined = {"metric": metric, "score": sum(values) / len(values), "stderr": None, "n": len(values)}
        yield name, {**joined, "items": {"ids": ids, "scores": values}}
