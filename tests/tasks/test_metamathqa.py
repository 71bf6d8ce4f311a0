"""The task of PEFT's method comparison, on a few rows of our own with the columns of its data sets."""

import json

import pytest
from lm_eval.tasks import TaskManager

from peft_steer.evaluation import tasks
from peft_steer.evaluation.datasets import sft_dataset
from peft_steer.evaluation.splits import complete_splits


METAMATH = [
    {"query": "What is 2 + 3?", "response": "2 + 3 = 5\nThe answer is: 5", "type": "GSM_Rephrased"},
    {"query": "A long question. " * 80, "response": "The answer is: 1", "type": "MATH_FOBAR"},
]
GSM8K = [
    {"question": "Ann has 1,000 coins and 2 more. How many?", "answer": "1000 + 2 = <<1000+2=1002>>1002\n#### 1,002"}
]


@pytest.fixture
def task(tmp_path):
    for folder, files in (
        ("meta-math/MetaMathQA", {"train": METAMATH}),
        ("openai/gsm8k/main", {"train": GSM8K, "test": GSM8K}),
    ):
        (tmp_path / folder).mkdir(parents=True)
        for split, rows in files.items():
            lines = "\n".join(json.dumps(row) for row in rows)
            (tmp_path / folder / f"{split}.jsonl").write_text(lines)
    manager = TaskManager(
        include_path=str(tasks.OUR_TASKS), include_defaults=False, metadata={"data_dir": str(tmp_path)}
    )
    return manager.load("metamathqa")["tasks"]["metamathqa"]


def test_what_is_trained_and_tested(task):
    assert sft_dataset(task).to_list() == [  # the long row is left out
        {
            "prompt": "Question: What is 2 + 3? Think step by step.\nAnswer:",
            "completion": " 2 + 3 = 5\nThe answer is: 5",
        }
    ]
    (doc,) = task.test_docs()
    assert tasks.target_of(task, doc) == "1000 + 2 = <<1000+2=1002>>1002\nThe answer is: 1,002"
    assert complete_splits(task) is None


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("1000 + 2 = 1002. The answer is: 1002", 1),
        ("The answer is: 5. No, wait. The answer is: $1,002.00.", 1),
        ("#### 1002", 1),
        ("The final answer is 1002", 1),
        ("The answer is: 1003", 0),
        ("The answer is: 10021", 0),
        ("1002", 0),
    ],
)
def test_the_number_counts(task, text, score):
    (doc,) = task.test_docs()
    (answer,) = tasks.filtered(task, doc, text).values()
    assert task.process_results(doc, [answer])["exact_match"] == score
