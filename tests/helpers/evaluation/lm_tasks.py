"""Tasks of lm-eval made in the test."""

import datasets
from lm_eval.api.task import ConfigurableTask


def make_task(**config) -> ConfigurableTask:
    """A task on two documents a split, in lm-eval's own terms."""
    options = [["two", "three"], ["three", "four"]]
    rows = {"question": ["1+1?", "2+2?"], "options": options, "answer": [0, 1], "text": ["two", "four"]}
    data = {split: datasets.Dataset.from_dict(rows) for split in ("train", "validation", "test")}
    defaults = {
        "task": "made_up",
        "custom_dataset": lambda **_: data,
        "training_split": "train",
        "validation_split": "validation",
        "test_split": "test",
        "doc_to_text": "Q: {{question}}\nA:",
        "metadata": {"version": 1},
    }
    return ConfigurableTask(config={**defaults, **config})
