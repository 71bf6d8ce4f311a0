"""The paper's six tasks on made-up documents of the same columns: prompts, answers, what is read from a generation."""

import json
import subprocess
import sys

import datasets
import paper_data
import pytest

from lm_eval_tasks.paper.hub import load
from peft_steer.evaluation import tasks
from peft_steer.evaluation.datasets import dpo_dataset, grpo_dataset, sft_dataset
from peft_steer.evaluation.rewards import reward_function


LISTS = {"n_train": 12, "n_validation": 3, "n_test": 3, "min_symbols": 4, "max_depth": 2}
SIX = ("steer_boolq", "steer_winogrande", "steer_listops", "steer_gsm8k", "steer_arc_challenge", "steer_aqua")
BOOLQ = (
    "Read the passage and answer the question with true or false.\nPassage: The bridge was built of oak.\n"
    "Question: is the bridge made of stone train 0\n"
)
WINOGRANDE = (
    "Choose the option that fills the blank in the sentence: The cup did not fit into the box because the _ was too "
    "wide. train 0\nOption1: cup\nOption2: box\n"
)
LISTOPS = (
    "Compute the value of the nested list expression. Give only the number, inside <answer></answer>.\n\n"
    "Expression:\n[SM [SM 4 7 5 9 3 8 2 4 ] [MAX 8 9 2 4 1 1 ] 5 1 5 3 7 8 ]\n"
)
ARC = (
    "Choose the right answer to the question.\nQuestion: What melts ice? train 0\n(A) heat\n(B) it's the moon\n"
    '(C) a "cold" wind\n'
)
AQUA = "Choose the right answer to the math question.\nQuestion: What is 2+5? train 0\nA)3\nB)5\nC)7\nD)9\nE)11\n"
PAIRS = {
    "steer_boolq": (BOOLQ, "Answer: False."),
    "steer_winogrande": (WINOGRANDE, "Answer: Option1."),
    "steer_listops": (LISTOPS, "<answer>0</answer>"),
    "steer_gsm8k": (
        "Tom has 3 bags of 4 nuts. How many nuts? train 0\n",
        "He has 3*4=<<3*4=12>>12 nuts.\nAnswer: 12",
    ),
    "steer_arc_challenge": (ARC, "Answer: (A) heat."),
    "steer_aqua": (AQUA, "2+5=7\nAnswer: option C, not B\nAnswer: C."),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return paper_data.write(tmp_path_factory.mktemp("hub") / "data")


@pytest.fixture(scope="module")
def task(root):
    loaded = {}

    def get(name: str):
        if name not in loaded:
            loaded[name] = tasks.load_task(name, metadata={"data_dir": str(root), **LISTS})[0]
        return loaded[name]

    return get


@pytest.mark.parametrize("name", SIX)
def test_a_training_pair(task, name):
    data = sft_dataset(task(name))
    assert (data[0]["prompt"], data[0]["completion"]) == PAIRS[name]
    assert len(data) == (12 if name == "steer_listops" else 10)
    # An answer is right by the task's own filter and metric, and the answer to another question is not.
    reward = reward_function(task(name))
    assert reward.__name__ == "exact_match,answer"
    columns = {"split": ["train"] * len(data), "doc_id": list(range(len(data)))}
    assert reward(completions=list(data["completion"]), **columns) == [1.0] * len(data)
    if name != "steer_listops":
        other = data["completion"][1:] + data["completion"][:1]
        assert reward(completions=list(other), **columns) == [0.0] * len(data)
    assert list(grpo_dataset(task(name))["prompt"]) == list(data["prompt"])


@pytest.mark.parametrize(
    ("name", "generated", "read"),
    [
        ("steer_boolq", "Answer: True.", "True"),
        ("steer_boolq", "answer : false\nAnswer: True.", "false"),
        ("steer_boolq", "It is false. Answer: True.", "True"),
        ("steer_boolq", "The truth is that this is false, not true", "false"),
        ("steer_boolq", "Answer: yes", "[invalid]"),
        ("steer_winogrande", "Answer: Option2.", "2"),
        ("steer_winogrande", "Option1? Answer: I say option 2, not Option1", "2"),
        ("steer_winogrande", "Option2.", "[invalid]"),
        ("steer_listops", "<answer>7</answer>", "7"),
        ("steer_listops", "It is 3\n<ANSWER> 12 </answer>", "12"),
        ("steer_listops", "7", "[invalid]"),
        ("steer_gsm8k", "3*4=<<3*4=12>>12 nuts.\nAnswer: 12", "12"),
        ("steer_gsm8k", "Answer: 5\nso 7\nAnswer: it is $1,800.50 or 3\nthat was 6", "1,800.50"),
        ("steer_gsm8k", "He pays 48+24 = -72 dollars.", "-72"),
        ("steer_gsm8k", "1234 nuts", "1234"),
        ("steer_gsm8k", "Answer: twelve, out of 20", "20"),
        ("steer_gsm8k", "none", "[invalid]"),
        ("steer_arc_challenge", "Answer: (B) iron.", "B"),
        ("steer_arc_challenge", "Answer: 2", "2"),
        ("steer_arc_challenge", "Answer: Because (B)", "B"),
        ("steer_arc_challenge", "Answer: Beyond (B) or (C)", "[invalid]"),
        ("steer_arc_challenge", "I think it is B", "B"),
        ("steer_arc_challenge", "A or B", "[invalid]"),
        ("steer_aqua", "7-2=5\nAnswer: B.", "B"),
        ("steer_aqua", "Answer: (c) and then answer: D", "c"),
        ("steer_aqua", "not A) but the answer is E", "E"),
        ("steer_aqua", "Answer: Depends", "[invalid]"),
    ],
)
def test_what_is_read_from_a_generation(task, name, generated, read):
    assert tasks.filtered(task(name), {}, generated) == {"answer": read}


@pytest.mark.parametrize(
    ("name", "doc", "generated"),
    [
        ("steer_gsm8k", 1, "Answer: 1800"),
        ("steer_gsm8k", 1, "Answer: $1,800.00"),
        ("steer_gsm8k", 0, "+12"),
        ("steer_boolq", 1, "answer: TRUE"),
        ("steer_aqua", 1, "Answer: a"),
    ],
)
def test_equal_answers_in_other_words(task, name, doc, generated):
    assert reward_function(task(name))([generated], split=["train"], doc_id=[doc]) == [1.0]


def test_preferences(task):
    for name, chosen, rejected in [
        ("steer_boolq", ["Answer: False.", "Answer: True."], ["Answer: True.", "Answer: False."]),
        ("steer_winogrande", ["Answer: Option1.", "Answer: Option2."], ["Answer: Option2.", "Answer: Option1."]),
    ]:
        data = dpo_dataset(task(name))[:2]
        assert (data["chosen"], data["rejected"]) == (chosen, rejected)
    wrong = {row["rejected"] for row in dpo_dataset(task("steer_arc_challenge"))}
    assert wrong == {"Answer: (B) it's the moon.", 'Answer: (C) a "cold" wind.', "Answer: (1) wood."}
    with pytest.raises(ValueError, match="'steer_gsm8k' has no choices"):
        dpo_dataset(task("steer_gsm8k"))


def test_the_papers_splits(tmp_path):
    """As many rows as the hub has: the rows that the released code tests on, in that order."""
    for split, size in {"train": 4, "validation": 3270, "test": 1319}.items():
        (tmp_path / "a/b").mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict({"i": list(range(size))}).to_json(tmp_path / "a/b" / f"{split}.jsonl")
    boolq = load(
        "a/b", data_dir=str(tmp_path), divide={"split": "validation", "held_out": "test", "share": 0.2, "seed": 42}
    )
    assert {split: len(rows) for split, rows in boolq.items()} == {"train": 4, "validation": 2616, "test": 654}
    assert boolq["test"]["i"][:3] == [1822, 2983, 2445]
    assert boolq["validation"]["i"][:3] == [1419, 1146, 2372]
    assert sorted([*boolq["validation"]["i"], *boolq["test"]["i"]]) == list(range(3270))
    gsm8k = load(
        "a/b", data_dir=str(tmp_path), divide={"split": "test", "held_out": "validation", "share": 0.2, "seed": 42}
    )
    assert {split: len(rows) for split, rows in gsm8k.items()} == {"train": 4, "validation": 264, "test": 1055}
    assert gsm8k["validation"]["i"][:3] == [1059, 384, 737]
    assert {k: len(v) for k, v in load("a", "b", str(tmp_path)).items()} == {
        "train": 4,
        "validation": 3270,
        "test": 1319,
    }


def test_data_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"data_dir: there is no folder '.*google/boolq'"):
        tasks.load_task("steer_boolq", metadata={"data_dir": str(tmp_path)})
    (tmp_path / "google/boolq").mkdir(parents=True)
    (tmp_path / "google/boolq/train.jsonl").write_text(json.dumps(paper_data.BOOLQ[0]) + "\n")
    with pytest.raises(ValueError, match=r"has no split 'validation', only \['train'\]"):
        tasks.load_task("steer_boolq", metadata={"data_dir": str(tmp_path)})
    with pytest.raises(ValueError, match=r"'steer_paper' is a group; name one of its tasks, \['steer_boolq', "):
        tasks.load_task("steer_paper")


def test_a_file_of_ones_own(root, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        f"include: {tasks.OUR_TASKS}/paper/steer_boolq.yaml\ntask: mine\ndataset_kwargs: {{data_dir: {root}}}\n"
    )
    mine, _ = tasks.load_task("mine", include_path=str(tmp_path))
    assert sft_dataset(mine)["prompt"][0] == BOOLQ


def test_plain_lm_eval_scores_all_six(tiny_llama, root, tmp_path):
    call = [sys.executable, "-m", "lm_eval", "--include_path", str(tasks.OUR_TASKS), "--tasks", "steer_paper"]
    call += ["--model", "hf", "--model_args", f"pretrained={tiny_llama}", "--device", "cpu", "--batch_size", "8"]
    call += ["--metadata", json.dumps({"data_dir": str(root), **LISTS}), "--gen_kwargs", "max_gen_toks=2"]
    call += ["--log_samples", "--output_path", str(tmp_path), "--limit", "2"]
    result = subprocess.run(call, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(next(tmp_path.rglob("results*.json")).read_text())
    assert set(report["results"]) == {*SIX, "steer_paper"}
    for name in SIX:
        task, _ = tasks.load_task(name, metadata={"data_dir": str(root), **LISTS})
        lines = next(tmp_path.rglob(f"samples_{name}_*.jsonl")).read_text().splitlines()
        samples = sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])
        asked = [sample["arguments"]["gen_args_0"]["arg_0"] for sample in samples]
        assert asked == [task.doc_to_text(doc) for doc in list(task.test_docs())[:2]]
        scores = [sample["exact_match"] for sample in samples]
        assert scores == [
            task.process_results(doc, [tasks.filtered(task, doc, sample["resps"][0][0])["answer"]])["exact_match"]
            for doc, sample in zip(task.test_docs(), samples, strict=False)
        ]
        assert report["results"][name]["exact_match,answer"] == sum(scores) / 2
    mean = sum(report["results"][name]["exact_match,answer"] for name in SIX) / 6
    assert report["results"]["steer_paper"]["exact_match,answer"] == pytest.approx(mean)
