"""A task without a validation split gets one out of its training split, the same one always."""

import pytest

from peft_steer.evaluation import tasks
from peft_steer.evaluation.splits import complete_splits


def _task(**splits):
    task, _ = tasks.load_task("listops_short")
    for name in ("training_split", "validation_split", "test_split"):
        task.set_config(name, splits.get(name))
    return task


def test_a_validation_split_is_taken_from_the_training_split():
    task = _task(training_split="train", test_split="test")
    before = list(task.training_docs()["expression"])
    remark = complete_splits(task)
    assert "400 of its 4,000 training documents are the validation split, 'test' is the test split" in remark
    train, validation = list(task.training_docs()["expression"]), list(task.validation_docs()["expression"])
    assert (len(train), len(validation)) == (3600, 400)
    assert sorted([*train, *validation]) == sorted(before)
    assert validation != before[-400:]  # drawn, not the end of it
    tasks.evaluate_on(task, "validation")
    assert list(task.eval_docs["expression"]) == validation
    again = _task(training_split="train", test_split="test")
    complete_splits(again)
    assert list(again.validation_docs()["expression"]) == validation
    examples = {doc["expression"] for doc in task.sampler.fewshot_docs()}
    assert examples == set(train)


def test_the_only_labelled_split_is_the_test_split():
    task = _task(training_split="train", validation_split="validation")
    labelled = list(task.validation_docs()["expression"])
    assert complete_splits(task)
    assert list(task.test_docs()["expression"]) == labelled
    assert set(task.validation_docs()["expression"]) <= set(
        _task(training_split="train").training_docs()["expression"]
    )


def test_splits_that_are_there_stay():
    task, _ = tasks.load_task("listops_short")
    assert complete_splits(task) is None
    with pytest.raises(ValueError, match="has no training split"):
        complete_splits(_task(test_split="test"))
    with pytest.raises(ValueError, match="has no validation or test split"):
        complete_splits(_task(training_split="train"))
