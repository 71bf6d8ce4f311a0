"""Prompts and completions as tokens: what is given and what is to be learned, as the harness would score it."""

import datasets
from transformers import PreTrainedTokenizerBase


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
            raise ValueError(f"no token is left to learn in {pair!r}")
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
