"""The splits of an lm-eval task that a comparison needs, for tasks that lack one."""

from lm_eval.api.task import ConfigurableTask

from peft_steer.utils.errors import UsageError

from .tasks import FEWSHOT_SEED


_HELD_OUT = "validation, of the training split"
_SHARE, _MOST = 10, 1000  # one document in ten is held out, a thousand at most


def complete_splits(task: ConfigurableTask) -> str | None:
    """Gives a task the splits that a comparison needs: to train on, to choose on (validation) and to report (test).

    Without a test split the validation split is the test split; without another validation split, a tenth of the
    training split (1,000 documents at most, always the same ones) is taken out of it.

    Returns:
        A line that says what was done, or None if the task had all three.

    Raises:
        UsageError: If the task has no training split, or neither of the others.
    """
    config = task.config
    evaluated = config.test_split or config.validation_split
    if config.training_split is None or evaluated is None:
        missing = "training" if config.training_split is None else "validation or test"
        raise UsageError(f"task {config.task!r} has no {missing} split")
    if config.test_split and config.validation_split and config.test_split != config.validation_split:
        return None
    rows = task.dataset[config.training_split]
    parts = rows.train_test_split(test_size=min(_MOST, max(1, len(rows) // _SHARE)), seed=FEWSHOT_SEED)
    task.dataset = {**task.dataset, config.training_split: parts["train"], _HELD_OUT: parts["test"]}
    task.set_config("test_split", evaluated)
    task.set_config("validation_split", _HELD_OUT)
    task.sampler.replace_df(list(task.fewshot_docs()))
    return (
        f"task {config.task!r}: {len(parts['test']):,} of its {len(rows):,} training documents are the validation "
        f"split, {evaluated!r} is the test split"
    )
