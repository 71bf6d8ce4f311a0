"""A task's own training split as data for TRL's trainers: what is given and what is to be learned, as the harness
would score it."""

import random
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask
from transformers import PreTrainedTokenizerBase

from peft_steer.utils.errors import UsageError

from .tasks import docs_of, filtered, gold_of, pair_of, target_of


def sft_dataset(task: ConfigurableTask, split: str = "train", **chat: Any) -> datasets.Dataset:
    """Columns `prompt` and `completion` for `SFTTrainer`, strings or, with `chat`, lists of messages.

    For a multiple-choice task the completion is the right choice as the harness scores it; for a generative one it is
    the target. Loglikelihood tasks without choices have no answer to train on.

    Args:
        task: An lm-eval task.
        split: `"train"`, or `"validation"` for what is watched during the training. They are the task's own.
        **chat: `apply_chat_template` and `system_instruction`, as lm-eval's flags.

    Raises:
        UsageError: If there is no such split, if it is the evaluated one, or if the task's type has no answer.
    """
    docs = docs_of(task, split, ("multiple_choice", "generate_until"))
    return _columns(pair_of(task, doc, **chat) for doc in docs)


def grpo_dataset(task: ConfigurableTask, split: str = "train", **chat: Any) -> datasets.Dataset:
    """Columns for `GRPOTrainer`: `prompt`, as in [`sft_dataset`]; `solution`, the answer as the task's first filter
    reads it (TRL's `accuracy_reward` wants it); and `split` and `doc_id`, by which
    [`~peft_steer.evaluation.rewards.reward_function`] finds the document.

    Raises:
        UsageError: If there is no such split, if it is the evaluated one, or if the task generates nothing.
    """
    docs = docs_of(task, split, ("generate_until",))
    rows = [
        {"prompt": pair_of(task, doc, **chat)[0], "solution": _solution(task, doc), "split": split, "doc_id": i}
        for i, doc in enumerate(docs)
    ]
    return datasets.Dataset.from_list(rows)


def dpo_dataset(task: ConfigurableTask, split: str = "train", seed: int = 0, **chat: Any) -> datasets.Dataset:
    """Columns `prompt`, `chosen` and `rejected` for `DPOTrainer`: the right choice and one of the wrong ones, drawn by
    `seed`.

    Raises:
        UsageError: If there is no such split, if it is the evaluated one, or if the task has no choices that follow
            one prompt.
    """
    docs = docs_of(task, split, ("multiple_choice", "generate_until"))
    if task.config.doc_to_choice is None:
        raise UsageError(f"task {task.config.task!r} has no choices (`doc_to_choice`), so no wrong answer is known")
    if task.multiple_input:
        raise UsageError(f"task {task.config.task!r}: its choices are in the prompt, so no two answers compare")
    draw = random.Random(seed)
    rows = []
    for doc in docs:
        prompt, chosen = pair_of(task, doc, **chat)
        choices, gold = task.doc_to_choice(doc), gold_of(task, doc)
        wrong = [i for i, text in enumerate(choices) if text not in {choices[g] for g in gold}]
        if not wrong:
            raise UsageError(f"task {task.config.task!r}: {doc!r} has no wrong choice")
        rows.append(
            {"prompt": prompt, "chosen": chosen, "rejected": pair_of(task, doc, choice=draw.choice(wrong), **chat)[1]}
        )
    return datasets.Dataset.from_list(rows)


def _columns(pairs: Any) -> datasets.Dataset:
    return datasets.Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in pairs])


def _solution(task: ConfigurableTask, doc: dict) -> str:
    target = target_of(task, doc)
    answer = str(next(iter(filtered(task, doc, target).values())))
    return target if answer in ("", "[invalid]") else answer  # a filter for completions may not match a target


def tokenize(dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, end: bool) -> datasets.Dataset:
    """Tokenizes pairs for TRL's `SFTTrainer`, which takes `input_ids` and `completion_mask` as they are.

    Left to itself the trainer ends every completion with the end-of-text token. That halves the weight of a one-token
    answer, and trains what a multiple-choice score never looks at.

    Args:
        dataset: Columns `prompt` and `completion`, strings.
        tokenizer: The model's.
        end: Whether a completion ends with the end-of-text token. Generated answers need it.

    Returns:
        `input_ids` (prompt and completion, tokenized together as the harness does) and `completion_mask` (1 on the
        tokens to learn).
    """

    def row(pair: dict[str, str]) -> dict[str, list[int]]:
        ids, n_prompt = encode(pair["prompt"], pair["completion"], tokenizer, end)
        if n_prompt >= len(ids):
            raise UsageError(f"no token is left to learn in {pair!r}")
        return {"input_ids": ids, "completion_mask": [0] * n_prompt + [1] * (len(ids) - n_prompt)}

    return dataset.map(row, remove_columns=dataset.column_names, desc="Tokenizing")


def encode(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase, end: bool) -> tuple[list[int], int]:
    """A prompt and its completion, tokenized together as the harness does.

    Args:
        end: Whether the completion ends with the end-of-text token.

    Returns:
        Token ids, and how many of them are the prompt's.
    """
    given, ids = (tokenizer(text).input_ids for text in (prompt.rstrip(), prompt + completion))
    # (Without the prompt's trailing spaces: the harness scores them with the completion.)
    if tokenizer("a").input_ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
        given, ids = given[:-1], ids[:-1]
    if end and ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    return ids, len(given)
