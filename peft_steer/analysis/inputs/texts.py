"""Real text for the analyses, as batches of tokens: from an lm-eval task or from a data set."""

import argparse
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from peft_steer import needs_prompts
from peft_steer.evaluation import tasks
from peft_steer.evaluation.datasets import encode, sft_dataset
from peft_steer.utils.devices import default_device
from peft_steer.utils.errors import UsageError, usage_errors

from .error_context import error_context


logger = logging.getLogger(__name__)

_TASK_FLAGS = ("include_path", "num_fewshot")
_DATASET_FLAGS = ("dataset_config", "split")


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, padded on the right.

    Attributes:
        input_ids: `(rows, tokens)`, int64.
        attention_mask: `(rows, tokens)`, int64, 1 at tokens and 0 at padding.
        completion_mask: `(rows, tokens)`, int64, 1 at the tokens of an answer. Text without prompts is all answer
            except for each row's first token, which nothing predicts.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    completion_mask: torch.Tensor

    @property
    def tokens(self) -> torch.Tensor:
        """`(rows, tokens)`, bool: True where there is a token."""
        return self.attention_mask.bool()

    @property
    def predicts_answer(self) -> torch.Tensor:
        """`(rows, tokens)`, bool: True where the next token is one of an answer."""
        return torch.nn.functional.pad(self.completion_mask[:, 1:], (0, 1)).bool()

    def inputs(self, model: nn.Module) -> dict[str, Any]:
        """Keyword arguments for the model's forward pass; adapters with `positions` are told where prompts end."""
        inputs: dict[str, Any] = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "use_cache": False,
        }
        if needs_prompts(model):
            inputs["prompt_lengths"] = self.completion_mask.argmax(1).tolist()
        return inputs


class Texts:
    """Batches of tokenized texts, sorted by length and the same in every iteration.

    Only token ids are kept. `texts.batches("Moments")` iterates with a progress bar of that name.

    Args:
        rows: `(token ids, number of prompt tokens)` of each text.
        batch_size: Rows in a batch.
        pad: Id of the padding token.
        device: Of the batches.
    """

    def __init__(self, rows: list[tuple[list[int], int]], batch_size: int, pad: int, device: torch.device | str):
        self.rows = sorted(rows, key=lambda row: len(row[0]))
        self.batch_size, self.pad, self.device = batch_size, pad, torch.device(device)

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.rows), self.batch_size):
            yield self.batch(self.rows[start : start + self.batch_size])

    def batches(self, label: str) -> Iterator[Batch]:
        """Iterates with a progress bar."""
        return iter(tqdm(self, desc=label, unit="batch"))

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts together."""
        return sum(len(ids) for ids, _ in self.rows)

    def batch(self, rows: list[tuple[list[int], int]]) -> Batch:
        """Rows as one batch."""
        width = max(len(ids) for ids, _ in rows)
        padded = [ids + [self.pad] * (width - len(ids)) for ids, _ in rows]
        index = torch.arange(width)
        length = torch.tensor([[len(ids)] for ids, _ in rows])
        prompt = torch.tensor([[n_prompt] for _, n_prompt in rows])
        present = (index < length).long()
        tensors = (torch.tensor(padded), present, present * (index >= prompt))
        return Batch(*(x.to(self.device) for x in tensors))


def load_texts(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> tuple[Texts, Texts]:
    """Texts to compute from, and others to measure on, drawn by `--seed`.

    Args:
        args: The flags of `peft_steer_cli.inputs.add_text_arguments`.
        tokenizer: With a padding token.

    Raises:
        UsageError: If not exactly one of `--task` and `--dataset` is given, or a flag of the other; if there is no
            such task or data set, or it lacks columns; if there is no text, or fewer than five if some are held out.
    """
    _check(args)
    pairs = list(_of_task(args) if args.task is not None else _of_dataset(args))
    rows = [row for row in (_encode(*pair, tokenizer, args.max_length) for pair in pairs) if row is not None]
    source = f"--task: {args.task!r}" if args.task is not None else f"--dataset: {args.dataset!r}"
    needed = 1 if args.held_out is None else 5
    if len(rows) < needed:
        raise UsageError(
            f"{source} gives {len(rows)} texts of two or more tokens and with an answer to each prompt; at least "
            f"{needed} are needed. Give more or longer texts, or raise --num_texts or --max_length"
        )
    if len(rows) < len(pairs):
        logger.warning(
            "%s: %d of %d texts are left out: --max_length %d cuts off their whole answer",
            source,
            len(pairs) - len(rows),
            len(pairs),
            args.max_length,
        )
    held_out = min(args.held_out or 0, len(rows) // 5)
    texts = [
        Texts(part, args.batch_size, tokenizer.pad_token_id, default_device())
        for part in (rows[held_out:], rows[:held_out])
    ]
    logger.info(
        "%d texts (%d tokens), and %d (%d tokens) held out",
        *(n for part in texts for n in (len(part.rows), part.num_tokens)),
    )
    return texts[0], texts[1]


def _check(args: argparse.Namespace) -> None:
    if (args.task is None) == (args.dataset is None):
        raise UsageError("--task, --dataset: give one of them")
    others, remedy = (_DATASET_FLAGS, "--dataset") if args.dataset is None else (_TASK_FLAGS, "--task")
    for name in others:
        if (value := getattr(args, name)) is not None:
            raise UsageError(f"--{name} is {value!r}, which goes with {remedy}; give that, or leave it out")


def _of_task(args: argparse.Namespace) -> Iterator[tuple[str, str, bool]]:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its hints are for authors of tasks
    with usage_errors():
        task, _ = tasks.load_task(args.task, args.include_path, args.num_fewshot)
        examples = sft_dataset(task)
    end = task.config.output_type == "generate_until"  # as in training, generated answers have an end token
    wanted = min(len(examples), args.num_texts + (args.held_out or 0))
    order = random.Random(args.seed).sample(range(len(examples)), wanted)
    return ((examples[i]["prompt"], examples[i]["completion"], end) for i in order)


def _of_dataset(args: argparse.Namespace) -> list[tuple[str, str, bool]]:
    path = Path(args.dataset)
    source: dict[str, Any] = {"path": args.dataset, "name": args.dataset_config}
    if path.is_file():
        if path.stat().st_size == 0:
            raise UsageError(f"--dataset: {args.dataset!r} is an empty file")
        if args.dataset_config is not None:
            raise UsageError(f"--dataset_config is {args.dataset_config!r}, and the file {args.dataset!r} has none")
        kind = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}.get(path.suffix, "text")
        source = {"path": kind, "data_files": args.dataset}
        if kind == "csv":  # pandas would turn "02" into 2 and "NA" into nothing
            source |= {"converters": dict.fromkeys(("text", "prompt", "completion"), str), "keep_default_na": False}
    with error_context("--dataset", args.dataset, "cannot be read"):
        data = datasets.load_dataset(**source, split=args.split or "train", streaming=True)
        columns = set(data.column_names or next(iter(data), {}))
    if not columns:
        raise UsageError(f"--dataset: {args.dataset!r} has no rows")
    if "text" not in columns and not {"prompt", "completion"} <= columns:
        raise UsageError(
            f"--dataset: {args.dataset!r} has the columns {sorted(columns)}; it needs `text`, or `prompt` and "
            "`completion`"
        )
    names = ("text",) if "text" in columns else ("prompt", "completion")
    with error_context("--dataset", args.dataset, "cannot be read"):
        rows = ([row[name] for name in names] for row in data.shuffle(seed=args.seed, buffer_size=10_000))
        cells = ([str(cell) for cell in row] for row in rows if None not in row)
        pairs = (("" if len(cell) == 1 else cell[0], cell[-1], False) for cell in cells)
        return list(islice((pair for pair in pairs if pair[1].strip()), args.num_texts + (args.held_out or 0)))


def _encode(
    prompt: str, completion: str, end: bool, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[int], int] | None:
    """Token ids, and how many of them are prompt (at least 1, as nothing predicts the first); None if no token of the
    answer is left."""
    ids, n_prompt = encode(prompt, completion, tokenizer, end)
    ids, n_prompt = ids[:max_length], max(1, n_prompt)
    return (ids, n_prompt) if len(ids) > n_prompt else None
