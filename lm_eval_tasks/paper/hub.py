"""Data sets of the hub, or files of the same columns, in the splits of arXiv 2603.00425."""

from pathlib import Path
from typing import Any

import datasets


SPLITS = ("train", "validation", "test")


def load(
    path: str,
    name: str | None = None,
    data_dir: str | None = None,
    divide: dict[str, Any] | None = None,
    **_: object,
) -> datasets.DatasetDict:
    """Loads one task's data. lm-eval passes the task's `metadata` (which `--metadata '{"data_dir": "DIR"}'` extends)
    and its `dataset_kwargs`.

    Args:
        path: The data set on the hub, such as `allenai/winogrande`.
        name: Its configuration, such as `winogrande_debiased`.
        data_dir: A folder of data sets instead of the hub, this one's in the subfolder `path/name`: files whose names
            begin with the hub's splits, such as `train.jsonl`, in any format that `load_dataset` knows. Copies of the
            hub's repositories are such folders.
        divide: `{"split": "validation", "held_out": "test", "share": 0.2, "seed": 42}` shuffles the hub's split
            `split`; this share of it becomes the split `held_out`, and the rest the other one of validation and test.
            None keeps the hub's splits.

    Returns:
        The splits train, validation and test, with the hub's columns.

    Raises:
        FileNotFoundError: If `data_dir` has no such folder.
        ValueError: If a split is missing.
    """
    if data_dir is None:
        source, data = path, datasets.load_dataset(path, name)
    else:
        source = str(Path(data_dir, path, name or ""))
        if not Path(source).is_dir():
            raise FileNotFoundError(
                f"data_dir: there is no folder {source!r}, where the data of {path!r} are expected"
            )
        data = datasets.load_dataset(source)
    needed = ("train", divide["split"]) if divide else SPLITS
    if missing := [split for split in needed if split not in data]:
        raise ValueError(f"{source!r} has no split {missing[0]!r}, only {list(data)}")
    if divide:
        parts = (
            data[divide["split"]]
            .shuffle(seed=divide["seed"])
            .train_test_split(test_size=divide["share"], seed=divide["seed"])
        )
        held_out = divide["held_out"]
        rest = "validation" if held_out == "test" else "test"
        data = {"train": data["train"], held_out: parts["test"], rest: parts["train"]}
    return datasets.DatasetDict({split: data[split] for split in SPLITS})
