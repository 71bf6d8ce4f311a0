"""Any task of lm-evaluation-harness: its documents, and each document's prompt and answer.

They are built by the task itself, from its own training split: a model is trained on exactly what the harness scores,
never on the split that it scores. `datasets.py` has them as training data, `rewards.py` the task's metric as a reward.
"""

from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

import lm_eval_tasks
from peft_steer.utils.errors import UsageError, suggest, usage_errors


OUR_TASKS = Path(lm_eval_tasks.__file__).parent
FEWSHOT_SEED = 1234  # the harness's own default


def load_task(
    name: str,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    metadata: dict[str, Any] | None = None,
) -> tuple[ConfigurableTask, TaskManager]:
    """Loads one task by name: from `include_path`, from our `lm_eval_tasks`, or from lm-eval's own.

    Args:
        name: The task's.
        include_path: A folder with more tasks, as lm-eval's flag.
        num_fewshot: Examples in each prompt, instead of the task's own number.
        metadata: Parameters of the task's data, as lm-eval's `--metadata`: `{"max_depth": 6}`, `{"data_dir": "DIR"}`.

    Raises:
        UsageError: If no task has that name, if it is a group of tasks, if its data cannot be loaded, if it never has
            examples, or if there is no folder `include_path`.
    """
    if include_path and not Path(include_path).is_dir():  # lm-eval would say nothing
        raise UsageError(f"include_path: there is no folder {include_path!r}")
    if num_fewshot is not None and num_fewshot < 0:
        raise UsageError(f"num_fewshot is {num_fewshot}, it must be at least 0")
    manager = _manager(name, include_path, metadata)
    if name in manager.all_groups:
        raise UsageError(f"task: {name!r} is a group; name one of its tasks, {manager.task_index[name].cfg['task']}")
    if name not in manager.all_subtasks:
        raise UsageError(f"task: {name!r} is not a single task known to lm-eval{suggest(name, manager.all_subtasks)}")
    with usage_errors(f"task {name!r}: ", (ValueError, OSError, ImportError)):  # its data cannot be had, or generated
        task = manager.load(name)["tasks"][name]
    if num_fewshot is not None:
        if task.config.num_fewshot == 0 and num_fewshot != 0:
            raise UsageError(f"num_fewshot: task {name!r} says 0, and lm-eval then evaluates without examples")
        task.set_config("num_fewshot", num_fewshot)
    task.set_fewshot_seed(FEWSHOT_SEED)
    return task, manager


def load_tasks(name: str, metadata: dict[str, Any] | None = None) -> list[ConfigurableTask]:
    """One task, or all tasks of a group such as MMLU or BBH, to be evaluated.

    Args:
        name: The task's or the group's.
        metadata: As in [`load_task`].

    Raises:
        UsageError: If there is neither of that name.
    """
    manager = _manager(name, None, metadata)
    if name not in manager.all_groups:
        return [load_task(name, metadata=metadata)[0]]
    members = list(manager.load(name)["tasks"].values())
    for task in members:
        task.set_fewshot_seed(FEWSHOT_SEED)
    return members


def _manager(name: str, include_path: str | None, metadata: dict[str, Any] | None) -> TaskManager:
    paths = [str(OUR_TASKS), *([include_path] if include_path else [])]
    manager = TaskManager(include_path=paths, include_defaults=False, metadata=metadata)
    if name not in manager.all_tasks:  # lm-eval's thousands of files are read only when they are needed
        manager = TaskManager(include_path=paths, metadata=metadata)
    return manager


def evaluate_on(task: ConfigurableTask, split: str) -> None:
    """Makes the harness evaluate `task` on its `"validation"` or `"test"` split (which it prefers if there is one).

    Raises:
        UsageError: If the task has no such split.
    """
    if split not in ("validation", "test"):
        raise UsageError(f"split: {split!r} is not 'validation' or 'test'")
    if (task.config.test_split if split == "test" else task.config.validation_split) is None:
        raise UsageError(f"split: task {task.config.task!r} has no {split} split")
    if split == "validation":
        task.set_config("test_split", None)


def docs_of(task: ConfigurableTask, split: str, output_types: tuple[str, ...]) -> list[dict]:
    """The documents of a split that may be trained on, of a task of one of these types; `UsageError` otherwise."""
    config = task.config
    names = {"train": config.training_split, "validation": config.validation_split}
    kind = "training" if split == "train" else split
    if names[split] is None:
        raise UsageError(f"task {config.task!r} has no {kind} split")
    evaluated = config.test_split or config.validation_split
    if names[split] == evaluated:
        use = "trained on" if split == "train" else "watched in training on"
        raise UsageError(f"task {config.task!r} would be {use} {evaluated!r}, the split that it is evaluated on")
    if config.output_type not in output_types:
        raise UsageError(
            f"task {config.task!r}: no such training data can be made of output_type {config.output_type!r}, only of "
            f"{' or '.join(map(repr, output_types))}"
        )
    if config.num_fewshot and task.fewshot_cfg.split == evaluated:
        raise UsageError(
            f"task {config.task!r} takes its examples from {evaluated!r}, the split that it is evaluated on; set "
            "`num_fewshot: 0`"
        )
    docs = list(task.training_docs() if split == "train" else task.validation_docs())
    if not docs:
        raise UsageError(f"task {config.task!r}: its {kind} split is empty")
    return docs


def pair_of(
    task: ConfigurableTask,
    doc: dict,
    choice: int | None = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
) -> tuple[Any, Any]:
    """A document's prompt, and the answer to it: the right one, or the choice with the index `choice`."""
    prefix = task.doc_to_prefix(doc)
    if apply_chat_template and prefix:
        raise UsageError(
            f"task {task.config.task!r} begins the answer itself (gen_prefix), which no chat trainer does"
        )
    with _not_its_own_example(task, doc):
        context = task.fewshot_context(
            doc,
            num_fewshot=task.config.num_fewshot or 0,
            gen_prefix=prefix,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,  # as the harness
            system_instruction=system_instruction,
            chat_template=_messages,
        )
    if task.config.output_type == "generate_until":
        text = target_of(task, doc) if choice is None else task.doc_to_choice(doc)[choice]
        answer = f"{task.config.target_delimiter}{text}"
    else:
        requests = task.construct_requests(doc, context, apply_chat_template=apply_chat_template)
        context, answer = requests[min(gold_of(task, doc)) if choice is None else choice].arguments
    if apply_chat_template:
        return context, [{"role": "assistant", "content": answer.strip()}]
    return context, answer


def _messages(messages: list[dict[str, str]], **_: bool) -> list[dict[str, str]]:
    """In the place of a chat template: TRL applies the tokenizer's."""
    return messages


@contextmanager
def _not_its_own_example(task: ConfigurableTask, doc: dict):
    """The harness draws few-shot examples from the training split and keeps only an evaluated document out of its own
    prompt; here the document is of the training split. Examples that a task writes out stay as they are: a document
    that is one of them has them all the same, or its prompt would differ from every other."""
    if not task.config.num_fewshot:
        yield
        return
    written_out = task.fewshot_cfg.split is None and task.fewshot_cfg.samples is not None
    sampler = task.sampler
    task.sampler = _Without(sampler, None if written_out else doc)
    try:
        yield
    finally:
        task.sampler = sampler


class _Without:
    def __init__(self, sampler: Any, doc: dict | None):
        self.sampler, self.doc = sampler, doc

    def sample(self, n: int, eval_doc: dict | None = None) -> Any:
        return self.sampler.sample(n, eval_doc=self.doc)


def gold_of(task: ConfigurableTask, doc: dict) -> set[int]:
    """Indices of the right choices."""
    # The choices stand in the contexts for tasks such as Winogrande; then the text field holds the right one's index.
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    choices = task.doc_to_choice(doc)
    indices = {choices.index(g) if isinstance(g, str) else g for g in (gold if isinstance(gold, list) else [gold])}
    if not indices or not all(0 <= i < len(choices) for i in indices):
        raise UsageError(f"task {task.config.task!r}: the right answer of {doc!r} is {gold!r}, none of its choices")
    return indices


def target_of(task: ConfigurableTask, doc: dict) -> str:
    """The (first) right answer of a document whose answer is generated."""
    target = task.doc_to_target(doc)
    if task.config.doc_to_choice is not None:
        target = task.doc_to_choice(doc)[target]
    if isinstance(target, list):
        target = target[0]
    if target is None:
        raise UsageError(f"task {task.config.task!r} has no answer to {doc!r}")
    return str(target)


def filtered(task: ConfigurableTask, doc: dict, text: str) -> dict[str, str]:
    """What each of the task's filters makes of a generated text."""
    instance = Instance("generate_until", doc, ("", {}), 0, resps=[text])
    for ensemble in task._filters:
        ensemble.apply([instance])
    return instance.filtered_resps
