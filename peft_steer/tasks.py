"""Any task of lm-evaluation-harness as a data set for supervised fine-tuning.

A pair of prompt and completion is built by the task itself, from its own training split: the model trains on exactly
the strings that the harness scores.
"""

import difflib
from pathlib import Path

import datasets
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

import lm_eval_tasks


OUR_TASKS = Path(lm_eval_tasks.__file__).parent


def load_task(name: str, include_path: str | None = None) -> tuple[ConfigurableTask, TaskManager]:
    """Loads one task by name: from `include_path`, from our `lm_eval_tasks`, or from lm-eval's own.

    Raises:
        ValueError: If no task has that name, or if it is a group of tasks.
    """
    paths = [str(OUR_TASKS), *([include_path] if include_path else [])]
    manager = TaskManager(include_path=paths, include_defaults=False)
    if name not in manager.all_tasks:  # lm-eval's thousands of files are read only when they are needed
        manager = TaskManager(include_path=paths)
    if name not in manager.all_subtasks:
        close = difflib.get_close_matches(name, manager.all_subtasks, n=3)
        hint = f", did you mean {close}?" if close else ""
        raise ValueError(f"task: {name!r} is not a single task known to lm-eval{hint}")
    return manager.load(name)["tasks"][name], manager


def evaluate_on(task: ConfigurableTask, split: str) -> None:
    """Makes the harness evaluate `task` on its `"validation"` or `"test"` split (which it prefers if there is one).

    Raises:
        ValueError: If the task has no such split.
    """
    if split not in ("validation", "test"):
        raise ValueError(f"split: {split!r} is none of 'validation', 'test'")
    if (task.config.test_split if split == "test" else task.config.validation_split) is None:
        raise ValueError(f"split: task {task.config.task!r} has no {split} split")
    if split == "validation":
        task.set_config("test_split", None)


def sft_dataset(task: ConfigurableTask) -> datasets.Dataset:
    """The training split as columns `prompt` and `completion`, both strings.

    For a multiple-choice task the completion is the right choice as the harness scores it; for a generative one it is
    the target. Loglikelihood tasks without choices have no answer to train on.

    Raises:
        ValueError: If there is no training split, if it is the evaluated one, or if the task's type has no answer.
    """
    config = task.config
    evaluated = config.test_split or config.validation_split
    if config.training_split is None:
        raise ValueError(f"task {config.task!r} has no training split")
    if config.training_split == evaluated:
        raise ValueError(f"task {config.task!r} would be trained on {evaluated!r}, the split that it is evaluated on")
    if config.output_type not in ("multiple_choice", "generate_until"):
        raise ValueError(f"task {config.task!r}: no training data can be made of output_type {config.output_type!r}")
    pairs = [_pair(task, doc) for doc in task.training_docs()]
    return datasets.Dataset.from_dict({"prompt": [p for p, _ in pairs], "completion": [c for _, c in pairs]})


def _pair(task: ConfigurableTask, doc: dict) -> tuple[str, str]:
    context = task.fewshot_context(doc, num_fewshot=0, gen_prefix=task.doc_to_prefix(doc))
    target = task.doc_to_target(doc)
    if task.config.output_type == "generate_until":
        return context, f"{task.config.target_delimiter}{target[0] if isinstance(target, list) else target}"
    # The choices stand in the contexts for tasks such as Winogrande; then the text field holds the right one's index.
    gold = task.doc_to_text(doc) if task.multiple_input else target
    if isinstance(gold, list):
        gold = gold[0]
    if isinstance(gold, str):
        gold = task.doc_to_choice(doc).index(gold)
    return task.construct_requests(doc, context)[gold].arguments


def tokenize(dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, end: bool) -> datasets.Dataset:
    """Tokenizes pairs for TRL's `SFTTrainer`, which takes `input_ids` and `completion_mask` as they are.

    Left to itself the trainer ends every completion with the end-of-text token. That halves the weight of a one-token
    answer, and trains what a multiple-choice score never looks at.

    Args:
        dataset: Columns `prompt` and `completion`.
        tokenizer: The model's.
        end: Whether a completion ends with the end-of-text token. Generated answers need it.

    Returns:
        `input_ids` (prompt and completion, tokenized together as the harness does) and `completion_mask` (1 on the
        tokens to learn).
    """

    def encode(pair: dict[str, str]) -> dict[str, list[int]]:
        n_prompt = len(tokenizer(pair["prompt"]).input_ids)
        ids = tokenizer(pair["prompt"] + pair["completion"]).input_ids
        if end and ids[-1] != tokenizer.eos_token_id:
            ids = [*ids, tokenizer.eos_token_id]
        if n_prompt >= len(ids):
            raise ValueError(f"no token is left to learn in {pair!r}")
        return {"input_ids": ids, "completion_mask": [0] * n_prompt + [1] * (len(ids) - n_prompt)}

    return dataset.map(encode, remove_columns=dataset.column_names, desc="Tokenizing")
