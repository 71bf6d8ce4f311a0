"""A grid: what it means, what is chosen, what is matched, and what is refused before anything is loaded."""

import re

import pytest
from grids import BASE, FULL, LORA, STEER, cells_of, write_grid

from peft_steer.bench.grid.candidates import _nearest, contenders
from peft_steer.bench.grid.parse import load_grid
from peft_steer.bench.grid.plan import Cell
from peft_steer.bench.grid.protocol import planned, run_grid
from peft_steer_cli import main


def test_a_grid_means_its_cells(tiny_llama, tmp_path):
    text = """
    model: unset
    tasks: [listops_short, {name: list_max_min, limit: 5, train: {max_steps: 9}}]
    limit: 7
    seeds: [3, 4]
    train: {max_steps: 5, weight_decay: 0.1}
    methods:
      - {name: base, peft_type: base}
      - {name: LoRA, peft_type: LORA, r: 4, learning_rate: [1e-3, 2e-3]}
      - {name: vector, peft_type: STEER, kind: vector, learning_rate: 1e-2, train: {max_steps: 6}}
    """
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    grid = load_grid(path, model=tiny_llama)
    sweep, final = planned(grid, contenders(grid)[0])
    # Only what has a choice is swept, with the first seed alone; the base has no seed.
    assert [(c.name, c.task, c.learning_rate, c.seed, c.split, c.limit) for c in sweep] == [
        ("LoRA", "listops_short", 0.001, 3, "validation", 7),
        ("LoRA", "listops_short", 0.002, 3, "validation", 7),
        ("LoRA", "list_max_min", 0.001, 3, "validation", 5),
        ("LoRA", "list_max_min", 0.002, 3, "validation", 5),
    ]
    assert [(c.name, c.seed, c.split) for c in final if c.task == "listops_short"] == [
        ("base", 0, "test"),
        ("LoRA", 3, "test"),
        ("LoRA", 4, "test"),
        ("vector", 3, "test"),
        ("vector", 4, "test"),
    ]
    paper = {"per_device_train_batch_size": 16, "lr_scheduler_type": "linear", "warmup_steps": 0.03}
    assert sweep[0].train == {**paper, "weight_decay": 0.1, "max_steps": 5}
    assert sweep[-1].train["max_steps"] == 9
    assert final[-1].train["max_steps"] == 6
    assert final[0].train == {}
    assert sweep[0].config == {"peft_type": "LORA", "r": 4, "task_type": "CAUSAL_LM"}
    assert len({cell.key for cell in [*sweep, *final]}) == 14
    # What the sweep trained with the chosen rate is not trained again.
    assert final[1].training_key == sweep[0].training_key != final[2].training_key


def test_the_papers_protocol_is_the_default(tmp_path):
    types = {"STEER": {}, "LORA": {}, "JOINT_STEER_LORA": {}, "full": {}}
    methods = [{"name": name, "peft_type": name, **fields} for name, fields in types.items()]
    grid = load_grid(write_grid(tmp_path, methods=methods, seeds=[0, 1, 2], train={}))
    rates = {method.name: method.learning_rates for method in grid.methods}
    assert {name: (len(r), r[0], r[-1]) for name, r in rates.items()} == {
        "STEER": (5, 5e-4, 5e-3),
        "LORA": (5, 5e-5, 1.5e-3),
        "JOINT_STEER_LORA": (5, 5e-5, 1.5e-3),
        "full": (5, 5e-6, 1e-4),
    }
    joint = grid.methods[2]
    assert joint.train == {"lr_scheduler_type": "cosine", "warmup_steps": 0.06}
    said = load_grid(write_grid(tmp_path, methods=methods, train={"lr_scheduler_type": "linear"}))
    assert said.methods[2].train == {"warmup_steps": 0.06}  # what the grid says holds for all


def test_a_cells_key_is_what_defines_its_result(tiny_llama, tmp_path):
    def first(**changes) -> Cell:
        return cells_of(write_grid(tmp_path, **{"model": tiny_llama, "methods": [LORA], **changes}))[0]

    key = first().key
    assert key == first(methods=[{**LORA, "name": "renamed"}]).key == first(gpus=1, processes=2).key
    text = tmp_path / "text.txt"
    text.write_text("words")
    evaluation = [{"limit": 41}, {"split": "validation"}, {"eval_batch_size": 3}, {"forgetting": "text.txt"}]
    training = [{"dtype": "bfloat16"}, {"train": {"max_steps": 4}}, {"seeds": [1]}]
    training += [{"task": {"name": "listops_short", "metadata": {"seed": 1}}}]
    training += [{"quantization": {"load_in_4bit": True}}]
    training += [{"methods": [{**LORA, field: value}]} for field, value in (("r", 3), ("learning_rate", 0.02))]
    changed = [first(**change) for change in (*evaluation, *training)]
    assert len({key, *(cell.key for cell in changed)}) == 1 + len(changed)
    trainings = [cell.training_key for cell in changed]
    assert set(trainings[: len(evaluation)]) == {first().training_key}
    assert len(set(trainings)) == 1 + len(training)


def test_the_choice_is_made_on_validation(tiny_llama, tmp_path):
    """The test split is evaluated once for each method and seed, and only for the choice."""
    swept = {**LORA, "learning_rate": [0.1, 0.2, 0.3]}
    other = {k: v for k, v in STEER.items() if k != "kind"}
    other |= {"learning_rate": [0.1, 0.2], "sweep": {"kind": ["linear", "nonlinear"]}}
    broken = {**STEER, "name": "broken", "kind": "vector", "learning_rate": [0.1, 0.2]}
    grid = load_grid(write_grid(tmp_path, model=tiny_llama, methods=[swept, other, broken, BASE], seeds=[0, 1]))
    asked = []

    def run(cells):
        asked.append(cells)
        return [_result(cell) for cell in cells]

    def _result(cell):
        if cell.name == "broken":
            return {"status": "failed", "error": "no"}
        assert cell.split == ("validation" if len(asked) == 1 else "test")
        best = cell.learning_rate == 0.2 and cell.config.get("kind", "linear") == "linear"
        return {"status": "done", "score": 0.9 if best else 0.9 - 1e-9}

    outcome = run_grid(grid, contenders(grid)[0], run)
    sweep, final = asked
    assert len(sweep) == 3 + 4 + 2
    assert [(c.name, c.learning_rate, c.config.get("kind"), c.seed) for c in final] == [
        ("LoRA", 0.2, None, 0),
        ("LoRA", 0.2, None, 1),
        ("post-block", 0.2, "linear", 0),
        ("post-block", 0.2, "linear", 1),
        ("base", 0.0, None, 0),
    ]
    assert outcome.cells == final + sweep
    assert len(outcome.results) == len(outcome.cells)
    said = "\n".join(outcome.remarks)
    assert "post-block: the chosen learning rate 0.2 is the largest tried: widen the sweep" in said
    assert "broken: all 2 runs of its sweep failed, so nothing was chosen and nothing tested" in said
    assert "LoRA" not in said


def test_parameters_are_matched(tiny_llama, tmp_path):
    methods = [
        {**STEER, "name": "ours", "r": 4},
        {"name": "LoRA", "peft_type": "LORA", "target_modules": ["q_proj", "v_proj"]},
        {"name": "as given", "peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]},
        {"name": "prompt", "peft_type": "PROMPT_TUNING", "matched": "num_virtual_tokens"},
        {"name": "vector", "peft_type": "STEER", "kind": "vector"},
    ]
    grid = load_grid(write_grid(tmp_path, model=tiny_llama, methods=methods, match="ours"))
    found, remarks = contenders(grid)
    width, blocks, value_width = 32, 2, 16
    ours = blocks * 2 * 4 * width
    of_one_rank = blocks * ((width + width) + (width + value_width))
    assert [(c.configs[0].get("r"), c.trainable[0]) for c in found] == [
        (4, ours),
        (2, 2 * of_one_rank),  # 448; 3 would be 672, of 512
        (8, blocks * 8 * 2 * width),
        (None, 512),
        (None, blocks * width),
    ]
    assert found[3].configs[0]["num_virtual_tokens"] == 16
    assert "LoRA: r=2 (448 parameters, 0.88 x 512)" in "\n".join(remarks)
    assert "vector: its size does not depend on r, so there is nothing to match" in "\n".join(remarks)


@pytest.mark.parametrize("budget", [1, 60, 100, 1000, 4321])
@pytest.mark.parametrize(
    "size", [lambda r: 7 * r, lambda r: 7 * r + 50, lambda r: r * r + r, lambda r: 100 * (r // 4 + 1) + r]
)
def test_the_nearest_rank(size, budget):
    found = _nearest(size, budget)
    best = min(range(1, 2000), key=lambda rank: abs(size(rank) - budget))
    assert abs(size(found) - budget) == abs(size(best) - budget)


def test_a_method_that_does_not_fit(tiny_llama, tmp_path, capsys):
    wrong = {**LORA, "name": "wrong", "target_modules": ["no_such_module"]}
    path = write_grid(tmp_path, model=tiny_llama, methods=[BASE, wrong])
    assert main(["bench", str(path), "--output", str(tmp_path / "out")]) == 2
    assert re.search("method 'wrong' does not fit .*no_such_module", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_the_same_run_twice(tiny_llama, tmp_path):
    path = write_grid(tmp_path, model=tiny_llama, methods=[LORA, {**LORA, "name": "again"}])
    with pytest.raises(ValueError, match="'LoRA' and 'again' define the same run"):
        cells_of(path)


def test_dry_run(tiny_llama, tmp_path, capsys):
    swept = {**LORA, "learning_rate": [0.1, 0.2]}
    path = write_grid(tmp_path, model=tiny_llama, methods=[BASE, swept], limit=None)
    assert main(["bench", str(path), "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "4 runs: 2 to choose on validation, 2 after it." in printed
    rows = [[text.strip() for text in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    assert [(row[0], row[1], row[3]) for row in rows[2:]] == [
        ("LoRA", "0.1", "validation"),
        ("LoRA", "0.2", "validation"),
        ("base", "–", "test"),
        ("LoRA", "0.1", "test"),
    ]
    assert "minutes on this machine" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tsak": "listops"}, r"tsak: unknown key, did you mean 'task'\?"),
        ({"task": None}, "task: is missing"),
        ({"methods": []}, "methods: is missing"),
        ({"split": "tets"}, r"split: 'tets' is not one of \('validation', 'test'\)"),
        ({"dtype": "int8"}, "dtype: 'int8' is not one of"),
        ({"limit": 0}, "limit: 0 is below 1"),
        ({"limit": "many"}, "limit: expected int, got 'many'"),
        ({"seeds": ["a"]}, "seeds: expected int, got 'a'"),
        ({"train": {"max_stpes": 3}}, r"train: max_stpes: unknown key, did you mean 'max_steps'\?"),
        ({"train": {"learning_rate": 1.0}}, "train: learning_rate: is set by the bench itself"),
        ({"train": {"lr_scheduler_type": "lineer"}}, "train: .*lineer"),
        (
            {"methods": [{**LORA, "peft_type": "LORAA"}]},
            r"method 'LoRA': peft_type: unknown 'LORAA', did you mean 'LORA'\?",
        ),
        ({"methods": [{**LORA, "rank": 3}]}, "method 'LoRA': rank: unknown key"),
        ({"methods": [{**LORA, "target_module": "q_proj"}]}, "did you mean 'target_modules'"),
        ({"methods": [{**STEER, "kind": "cubic"}]}, "method 'post-block': .*kind='cubic'"),
        ({"methods": [{**LORA, "learning_rate": "fast"}]}, "method 'LoRA': learning_rate: 'fast' is not a number"),
        ({"methods": [{**LORA, "learning_rate": -1.0}]}, "method 'LoRA': learning_rate: -1.0 is not above 0"),
        (
            {"methods": [{**LORA, "learning_rate": ["0.001"]}]},
            "learning_rate: '0.001' is not a number .write it without",
        ),
        (
            {"methods": [{**LORA, "learning_rate": [0.1, 0.1]}]},
            r"'LoRA': learning_rate: \[0.1, 0.1\] has a value twice",
        ),
        ({"methods": [{**LORA, "learning_rate": []}]}, "method 'LoRA': learning_rate: the list is empty"),
        ({"methods": [{**LORA, "sweep": {"r": [1, 2]}}]}, "method 'LoRA': r: stands in the method and in its sweep"),
        ({"methods": [{**LORA, "sweep": {"rank": [1]}}]}, "method 'LoRA': sweep: rank: unknown key"),
        ({"methods": [{**LORA, "sweep": {"lora_alpha": []}}]}, "sweep: lora_alpha: the list is empty"),
        (
            {"methods": [{"name": "post-block", "peft_type": "STEER", "sweep": {"kind": ["cubic"]}}]},
            "method 'post-block': .*kind='cubic'",
        ),
        ({"methods": [{**LORA, "matched": "r"}]}, "matched: the grid has no `match` that says to what"),
        ({"match": "lora"}, r"match: no method has the name 'lora', did you mean 'LoRA'\?"),
        ({"match": "post-block", "methods": [{**LORA, "matched": "r"}, STEER]}, "r: is given, and to be matched too"),
        ({"match": "post-block", "methods": [{**LORA, "matched": "q"}, STEER]}, "'q' is not a field of LORA"),
        ({"models": ["a"]}, "model and models: give one of them"),
        ({"task": None, "tasks": ["listops", "listops"]}, r"tasks: the names \['listops'\] occur twice"),
        ({"task": {"name": "listops", "limt": 3}}, r"tasks\[0\]: limt: unknown key, did you mean 'limit'\?"),
        ({"model": {"name": "a", "quantization": {"load_in_3bit": True}}}, "quantization: load_in_3bit: unknown key"),
        ({"gpus": -1}, "gpus: must be a number of at least 0, not -1"),
        ({"processes": 0}, "processes: 0 is below 1"),
        ({"seeds": []}, "seeds: the list is empty"),
        ({"forgetting": "nowhere.txt"}, "forgetting: there is no text file .*nowhere.txt"),
        ({"methods": [{**FULL, "r": 8}]}, "method 'full': r: unknown key"),
        ({"methods": [{**BASE, "learning_rate": 1.0}]}, "method 'base': learning_rate: unknown key"),
        ({"train": {"completion_only_loss": False}}, "train: completion_only_loss: is set by the bench itself"),
        ({"methods": [LORA, {**LORA, "r": 3}]}, r"methods: the names \['LoRA'\] occur twice"),
        ({"methods": ["LoRA"]}, r"methods\[0\]: expected dict, got 'LoRA'"),
    ],
)
def test_bad_grids(tmp_path, capsys, changes, message):
    path = write_grid(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_grid(path)
    assert str(error.value).startswith(f"{path}: ")
    assert main(["bench", str(path), "--output", str(tmp_path / "out")]) == 2
    assert str(error.value) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_yaml(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("model: [")
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_grid(path)
