"""Any data set of reasoning-gym as a task: its questions in three disjoint splits, its own verifier as the metric."""

import hashlib
import json
from typing import Any

import datasets
import reasoning_gym


SPLITS = ("train", "validation", "test")
_PATIENCE = 20  # times as many questions as wanted are drawn, before giving up


def load(
    dataset: str,
    n_train: int,
    n_validation: int,
    n_test: int,
    seed: int,
    params: dict[str, Any] | None = None,
    **_: object,
) -> datasets.DatasetDict:
    """Builds the three splits. lm-eval passes the task's `metadata`, which `--metadata '{"n_test": 50}'` overrides.

    A question's own hash decides its split, so no question is in two of them, for any sizes.

    Args:
        dataset: reasoning-gym's name, such as `gsm_symbolic`.
        n_train, n_validation, n_test: Questions per split.
        seed: Of the generator.
        params: Fields of the data set's config, such as `{"max_terms": 3}`.

    Returns:
        For each split the columns `question`, `answer`, and `entry` (reasoning-gym's own record, as JSON).

    Raises:
        ValueError: For an unknown data set or field, or if there are too few different questions.
    """
    wanted = dict(zip(SPLITS, (n_train, n_validation, n_test), strict=True))
    draws = _PATIENCE * max(n_train, 10 * n_validation, 10 * n_test, 100)
    try:
        source = reasoning_gym.create_dataset(dataset, seed=seed, size=draws, **(params or {}))
    except (TypeError, AssertionError) as error:
        raise ValueError(f"reasoning-gym's {dataset!r} does not take {params}: {error}") from error
    drawn: dict[str, dict[str, dict]] = {split: {} for split in SPLITS}
    for i in range(draws):
        if all(len(drawn[split]) == wanted[split] for split in SPLITS):
            break
        entry = source[i]
        split = _split(entry["question"])
        if len(drawn[split]) < wanted[split]:
            drawn[split].setdefault(entry["question"], entry)
    else:
        counts = {split: len(drawn[split]) for split in SPLITS}
        raise ValueError(f"reasoning-gym's {dataset!r}: wanted {wanted} different questions, found {counts}")
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_list(
                [
                    {"question": e["question"], "answer": e["answer"], "entry": json.dumps(e, default=str)}
                    for e in entries.values()
                ]
            )
            for split, entries in drawn.items()
        }
    )


def _split(question: str) -> str:
    bucket = hashlib.sha256(question.encode()).digest()[0] % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The data set's verifier: `acc`, 1 for a right answer; `score`, which may be partial for a nearly right one."""
    entry = json.loads(doc["entry"])
    score = float(reasoning_gym.get_score_answer_fn(entry["metadata"]["source_dataset"])(results[0].strip(), entry))
    return {"acc": float(score >= 1), "score": score}
