"""Trainers, choices after fewer steps, what is kept, published scores: what a grid means and what a report says."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from grids import BASE, FULL, LORA, STEER, cells_of, write_grid
from scipy import stats
from synthetic_bench import GRID, cell, result

from peft_steer.bench.grid.parse import load_grid
from peft_steer.bench.grid.plan import Reference
from peft_steer.bench.grid.task_checks import check_tasks
from peft_steer.bench.report import write_report
from peft_steer.bench.report.frame import settings
from peft_steer.bench.report.over_steps import mean_curve
from peft_steer.bench.report.reference import within_noise
from peft_steer.bench.report.retention import changes, frontier
from peft_steer.bench.statistics import Scores, compare
from peft_steer.evaluation.tasks import load_task


GRPO = {"num_generations": 2, "max_completion_length": 2}
JOINT = {"name": "joint", "peft_type": "JOINT_STEER_LORA", "target_modules": "all-linear", "learning_rate": 0.01}


def test_trainers_of_one_table(tiny_llama, tmp_path):
    train = {"max_steps": 3, "per_device_train_batch_size": 4, "grpo": GRPO, "sft": {"max_length": 99}}
    methods = [BASE, STEER, {**LORA, "trainer": "sft", "train": {"max_steps": 5}}]
    path = write_grid(tmp_path, model=tiny_llama, task="list_max_min", trainer="grpo", train=train, methods=methods)
    base, steered, tuned = cells_of(path)
    assert [base.trainer, steered.trainer, tuned.trainer] == ["sft", "grpo", "sft"]
    assert base.train == {}
    assert steered.train["num_generations"] == 2
    assert steered.train["max_steps"] == 3
    assert "max_length" not in steered.train
    assert tuned.train["max_steps"] == 5
    assert tuned.train["max_length"] == 99
    assert "num_generations" not in tuned.train


def test_what_came_later_leaves_the_keys(tiny_llama, tmp_path):
    """A store of before has `cell` without the new fields, under the same key."""
    old = cell()
    fields = asdict(old)
    for name in ("trainer", "rewards", "prompt", "retention", "kl_prompts"):
        del fields[name]
    assert type(old)(**fields).key == old.key
    # The key of a cell as version 2 of the format had it, pinned.
    committed = Path(__file__).parents[2] / "docs" / "listops_135m_plateau" / "store" / "cells"
    for path in committed.glob("*.json"):
        assert type(old)(**json.loads(path.read_text())["cell"]).key == path.stem
    changes = [{"trainer": "grpo"}, {"rewards": ["task"]}, {"prompt": {"num_fewshot": 1}}]
    scored = [{"retention": [{"name": "x", "limit": None, "metadata": {}}]}, {"kl_prompts": 2}]
    changed = [replace(old, **change) for change in (*changes, *scored)]
    assert len({other.key for other in (old, *changed)}) == 6
    assert len({other.training_key for other in (old, *changed)}) == 4  # an evaluation trains nothing again


def test_a_choice_after_fewer_steps(tiny_llama, tmp_path):
    methods = [BASE, {**STEER, "learning_rate": [0.01, 0.02]}, LORA]
    choose = {"limit": 10, "train": {"max_steps": 1}}
    path = write_grid(tmp_path, model=tiny_llama, methods=methods, choose=choose, retention=["list_max_min"])
    cells = cells_of(path)
    assert [(c.name, c.split, c.limit, c.train.get("max_steps"), len(c.retention)) for c in cells] == [
        ("post-block", "validation", 10, 1, 0),
        ("post-block", "validation", 10, 1, 0),
        ("base", "test", 40, None, 1),
        ("post-block", "test", 40, 3, 1),
        ("LoRA", "test", 40, 3, 1),
    ]


def test_the_rate_of_a_joint_adapters_steering_half(tiny_llama, tmp_path):
    methods = [BASE, {**JOINT, "sweep": {"steer_learning_rate": [0.1, 0.2]}}]
    cells = cells_of(write_grid(tmp_path, model=tiny_llama, methods=methods))
    assert [c.config["steer_learning_rate"] for c in cells if c.name == "joint"] == [0.1, 0.2, 0.1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer": "ppo"}, r"trainer: 'ppo' is not one of \('sft', 'grpo', 'dpo'\)"),
        ({"methods": [{**STEER, "trainer": "ppo"}]}, "method 'post-block': trainer: 'ppo' is not one"),
        ({"train": {"num_generations": 2}}, "train: num_generations: unknown key"),
        ({"train": {"grpo": {"num_generation": 2}}}, "train: grpo: num_generation: unknown key, did you mean"),
        ({"train": {"grpo": {"seed": 2}}}, "train: grpo: seed: is set by the bench itself"),
        (
            {"methods": [STEER, {**LORA, "trainer": "grpo"}], "train": {"num_generations": 2}},
            "train: num_generations: sft, which this grid uses too, has no such field; put it into a block `grpo:`",
        ),
        (
            {"trainer": "grpo", "train": {"num_generations": 3, "per_device_train_batch_size": 4}},
            "method 'LoRA': train: .*divisible",
        ),
        ({"choose": {"limit": 3}}, "choose: no method has several learning rates"),
        ({"choose": {"split": "test"}}, "choose: split: unknown key"),
        ({"retention": ["list_max_min"], "methods": [LORA]}, "retention: .* add a method with `peft_type: base`"),
        ({"retention": ["a", "a"]}, r"retention: the names \['a'\] occur twice"),
        ({"retention": [{"name": "a", "limit": 0}]}, r"retention\[0\]: limit: 0 is below 1"),
        ({"kl_prompts": -1}, "kl_prompts: -1 is below 0"),
        (
            {"task": {"name": "listops_short", "rewards": ["task"]}},
            "rewards: no method is trained with `trainer: grpo`",
        ),
        ({"task": {"name": "listops_short", "num_fewshot": True}}, "num_fewshot: expected int, got True"),
        ({"methods": [{**LORA, "steer_learning_rate": 1.0}]}, "method 'LoRA': steer_learning_rate: unknown key"),
        ({"methods": [{**JOINT, "steer_learning_rate": "fast"}]}, "steer_learning_rate: 'fast' is not a number"),
        ({"methods": [{**FULL, "steer_learning_rate": 1.0}]}, "method 'full': steer_learning_rate: unknown key"),
        (
            {"reference": [{"method": "LoRe", "task": "listops_short", "score": 0.5, "source": "a paper"}]},
            r"reference\[0\]: method: no method has the name 'LoRe', did you mean 'LoRA'",
        ),
        (
            {"reference": [{"method": "LoRA", "task": "listops_short", "score": "50", "source": "a paper"}]},
            r"reference\[0\]: score: '50' is not a number",
        ),
    ],
)
def test_grids_that_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_grid(write_grid(tmp_path, **changes))


def test_tasks_that_do_not_fit(tmp_path):
    choices, lists = load_task("listops_short")[0], load_task("list_max_min")[0]
    grid = load_grid(write_grid(tmp_path, trainer="grpo", train={"per_device_train_batch_size": 8}))
    with pytest.raises(ValueError, match=r"task 'listops_short': .* 'multiple_choice', only of 'generate_until'"):
        check_tasks(grid, {"listops_short": choices})
    grid = load_grid(write_grid(tmp_path, task="list_max_min", trainer="dpo"))
    with pytest.raises(ValueError, match=r"task 'list_max_min': .* has no choices"):
        check_tasks(grid, {"list_max_min": lists})
    grid = load_grid(write_grid(tmp_path, kl_prompts=3))
    with pytest.raises(ValueError, match="kl_prompts: the task generates nothing"):
        check_tasks(grid, {"listops_short": choices})


def kept(values: list[float]) -> dict:
    items = {"ids": [f"kept {i}" for i in range(len(values))], "scores": values}
    return {
        "other": {"metric": "acc", "score": float(np.mean(values)), "stderr": None, "n": len(values), "items": items}
    }


@pytest.fixture
def kept_group():
    """The base keeps 90 of 100; one method keeps all of them, another loses 40."""
    before = [1.0] * 90 + [0.0] * 10
    after = {"gentle": before, "rough": [0.0] * 40 + before[40:]}
    pairs = [(cell("base"), result(cell("base"), 0.2, retention=kept(before)))]
    for name, values in after.items():
        for seed in range(2):
            made = cell(name, seed=seed)
            rewards = {"reward": [[1, 0.1], [2, 0.3 + 0.2 * seed]]}
            pairs.append((made, result(made, 0.5, retention=kept(values), curves=rewards)))
    return pairs


def test_what_is_kept(kept_group):
    (setting,) = settings(*zip(*kept_group, strict=True))
    found = changes(setting)["other"]
    assert found["gentle"].difference == 0
    assert found["gentle"].tie
    assert found["rough"].difference == pytest.approx(-0.4)
    # The two trainings lose the same items: without a part for seeds this is the paired t-test.
    lost = np.array([1.0] * 40 + [0.0] * 60)
    assert found["rough"].p == pytest.approx(stats.ttest_1samp(-lost, 0).pvalue, rel=1e-6)
    assert found["rough"].p_holm == pytest.approx(2 * found["rough"].p, rel=1e-6)
    points = {point.label: point for point in frontier(setting)}
    assert points["rough"].loss == pytest.approx(0.4)
    assert points["gentle"].loss == 0
    gain = {name: points[name].gain for name in points}
    assert points["gentle"].best
    assert points["rough"].best == (gain["rough"] > gain["gentle"])


def test_gain_against_the_forgetting_of_plain_text():
    """Without retained tasks; its standard error is over seeds."""
    pairs = [(cell("base"), result(cell("base"), 0.2))]
    for seed, after in enumerate((3.2, 3.4, 3.9)):
        made = cell("LoRA", seed=seed)
        pairs.append((made, result(made, 0.5, forgetting={"before": 3.0, "after": after})))
    (point,) = frontier(*settings(*zip(*pairs, strict=True)))
    assert point.loss == pytest.approx(0.5)
    assert point.loss_error == pytest.approx(np.std([0.2, 0.4, 0.9], ddof=1) / 3**0.5)
    assert point.best


def test_the_report_says_it(kept_group, tmp_path):
    reference = (
        Reference("gentle", "listops_short", 0.51, "a paper", n=200),
        Reference("rough", "listops_short", 0.99, "x"),
    )
    cells, results = zip(*kept_group, strict=True)
    text = write_report(replace(GRID, reference=reference), cells, results, tmp_path)
    page = (tmp_path / "report.html").read_text()
    for said in ("What is kept of other tasks", "Published, and ours", "a paper", "within the noise"):
        assert said in text
        assert said in page
    assert "| rough" in text
    assert "−0.400" in text
    for name in ("reward.png", "frontier.png", "figure.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    assert "Gain against loss" in page


def test_within_the_noise():
    entry = Reference("m", "t", 0.5, "s", n=100)  # a standard error of 0.05
    assert within_noise(0.59, 0.0, entry)
    assert not within_noise(0.60, 0.0, entry)
    assert within_noise(0.63, 0.05, entry)  # 1.96 * 0.05 * sqrt(2) = 0.1386
    assert not within_noise(0.64, 0.05, entry)
    assert not within_noise(0.51, 0.005, replace(entry, n=None))


def test_the_mean_curve_has_the_common_steps():
    assert mean_curve({0: [(1, 0.0), (2, 1.0)], 1: [(1, 1.0), (2, 0.5), (3, 9.0)]}) == [(1, 0.5), (2, 0.75)]


def test_the_smallest_difference_that_could_be_seen():
    """Of simulated pairs with this true difference, four in five are significant before the correction."""
    rng = np.random.default_rng(0)
    ids = tuple((str(i), 0) for i in range(400))

    def pair(difference: float):
        base = rng.normal(0, 1, 400)
        return compare(Scores("a", ids, (base + rng.normal(difference, 1, 400))[None]), Scores("b", ids, base[None]))

    seen = np.mean([pair(0.0).detectable for _ in range(50)])
    assert np.mean([pair(seen).p < 0.05 for _ in range(600)]) == pytest.approx(0.8, abs=0.06)
