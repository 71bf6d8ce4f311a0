"""MetaMathQA to train on, GSM8K to choose and to report on, as in PEFT's method comparison."""

import re
from pathlib import Path

import datasets


_MAX_CHARACTERS = 1300  # of a question and its answer, as PEFT has it: about 768 tokens
_METAMATH, _GSM8K = ("meta-math/MetaMathQA", None), ("openai/gsm8k", "main")
_VALIDATION = 500


def load(data_dir: str | None = None, **_: object) -> datasets.DatasetDict:
    """The splits train (MetaMathQA without its longest rows), validation (500 rows of GSM8K's training split) and test
    (GSM8K's), with the columns `query` and `response`.

    Args:
        data_dir: A folder with copies of both data sets in subfolders with their names, instead of the hub.
    """
    metamath, gsm8k = _data(data_dir, *_METAMATH), _data(data_dir, *_GSM8K)
    gsm8k = gsm8k.map(
        lambda row: {"query": row["question"], "response": _in_words(row["answer"])},
        remove_columns=["question", "answer"],
    )
    rows = gsm8k["train"].shuffle(seed=0)
    return datasets.DatasetDict(
        train=metamath["train"]
        .select_columns(["query", "response"])
        .filter(lambda row: len(row["query"]) + 1 + len(row["response"]) <= _MAX_CHARACTERS),
        validation=rows.select(range(min(_VALIDATION, len(rows)))),
        test=gsm8k["test"],
    )


def _data(data_dir: str | None, path: str, name: str | None) -> datasets.DatasetDict:
    if data_dir is None:
        return datasets.load_dataset(path, name)
    folder = Path(data_dir, path, name or "")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data_dir: there is no folder {str(folder)!r}, where the data of {path!r} are expected"
        )
    return datasets.load_dataset(str(folder))


def _in_words(answer: str) -> str:
    """GSM8K's `... #### 1,000`, ended as MetaMathQA's responses end."""
    return re.sub(r"\s*####\s*", "\nThe answer is: ", answer)
