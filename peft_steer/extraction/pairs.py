"""Contrastive pairs as tokens: two texts that differ in what is to be steered, and where the difference is read.

A pair is either two texts, with a common prompt or without one, or one question under two system prompts.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
from transformers import PreTrainedTokenizerBase


COLUMNS = ("positive", "negative")
_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Text:
    """Token ids, and from which on they are the span that is read."""

    ids: list[int]
    start: int = 0


@dataclass(frozen=True)
class Pair:
    """A positive and a negative text.

    Attributes:
        has_prompt: Whether both are answers to one prompt, which ends where their spans begin.
    """

    positive: Text
    negative: Text
    has_prompt: bool = False


def load_rows(name: str, split: str = "train", columns: tuple[str, ...] = COLUMNS) -> list[dict[str, Any]]:
    """Rows with `columns` (and `prompt`, if there is one) of a JSON, JSONL, CSV or Parquet file or a data set.

    Raises:
        ValueError: If a column is missing or empty.
    """
    path = Path(name)
    if path.suffix in _BUILDERS:
        if not path.is_file():
            raise FileNotFoundError(f"--pairs: there is no file {name!r}")
        data = datasets.load_dataset(_BUILDERS[path.suffix], data_files=str(path), split="train")
    else:
        data = datasets.load_dataset(name, split=split)
    missing = [column for column in columns if column not in data.column_names]
    if missing:
        raise ValueError(f"--pairs: {name} has no column {missing[0]!r}; there are {', '.join(data.column_names)}")
    rows = list(data.select_columns([c for c in (*columns, "prompt") if c in data.column_names]))
    for number, row in enumerate(rows):
        if not all(row[column] for column in columns):
            raise ValueError(f"--pairs: row {number} of {name} is empty in one of {', '.join(columns)}")
    return rows


def load_questions(name: str) -> list[str]:
    """The lines of a text file, or a JSON list of strings.

    Raises:
        ValueError: If there are none.
    """
    text = Path(name).read_text(encoding="utf-8")
    questions = json.loads(text) if name.endswith(".json") else text.splitlines()
    questions = [question.strip() for question in questions if question.strip()]
    if not questions:
        raise ValueError(f"--questions: {name} has none")
    return questions


def pair_of(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Pair:
    """A row's pair. Texts are strings, or lists of messages, which the tokenizer's chat template makes a string of; a
    prompt of messages is followed by the beginning of the answer."""
    prompt = row.get("prompt")
    if not prompt:
        positive, negative = (Text(_tokens(row[column], tokenizer)) for column in COLUMNS)
        return Pair(positive, negative)
    is_chat = not isinstance(prompt, str)
    given = _templated(prompt, tokenizer, add_generation_prompt=True) if is_chat else prompt
    # Together with the answer: its first token may hold the space before it.
    start = len(tokenizer(given.rstrip() if not is_chat else given, add_special_tokens=not is_chat).input_ids)
    positive, negative = (
        Text(tokenizer(given + row[column], add_special_tokens=not is_chat).input_ids, start) for column in COLUMNS
    )
    if start >= min(len(positive.ids), len(negative.ids)):
        raise ValueError(f"--pairs: no token is left of an answer in {row!r}")
    return Pair(positive, negative, has_prompt=True)


def pair_of_systems(question: str, systems: tuple[str, str], tokenizer: PreTrainedTokenizerBase) -> Pair:
    """A question under two system prompts, up to where the answer begins. The span is what both have in common there:
    the question and the beginning of the answer."""
    ids = [
        _tokens(
            [{"role": "system", "content": system}, {"role": "user", "content": question}],
            tokenizer,
            add_generation_prompt=True,
        )
        for system in systems
    ]
    common = 0
    while common < min(map(len, ids)) and ids[0][-common - 1] == ids[1][-common - 1]:
        common += 1
    if not common or common == min(map(len, ids)):
        raise ValueError("the chat template does not show the system prompt before the question and the answer after")
    positive, negative = (Text(x, len(x) - common) for x in ids)
    return Pair(positive, negative)


def _tokens(text: str | list, tokenizer: PreTrainedTokenizerBase, **template: Any) -> list[int]:
    if isinstance(text, str):
        return tokenizer(text).input_ids
    return tokenizer(_templated(text, tokenizer, **template), add_special_tokens=False).input_ids


def _templated(messages: list, tokenizer: PreTrainedTokenizerBase, **template: Any) -> str:
    if tokenizer.chat_template is None:
        raise ValueError(f"{tokenizer.name_or_path} has no chat template, and the texts are messages; give strings")
    return cast(str, tokenizer.apply_chat_template(messages, tokenize=False, **template))
