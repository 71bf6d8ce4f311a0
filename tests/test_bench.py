"""The benchmark: what a grid means, what is refused before anything is loaded, and runs that fail, stop and go on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_steer import tasks
from peft_steer.bench.command import main
from peft_steer.bench.plan import Cell, load_grid
from peft_steer.bench.store import Store


LORA = {"name": "LoRA", "peft_type": "LORA", "r": 2, "target_modules": "all-linear", "learning_rate": 0.01}
STEER = {"name": "post-block", "peft_type": "STEER", "kind": "nonlinear", "r": 2, "learning_rate": 0.01}
BASE = {"name": "base", "peft_type": "base"}
FULL = {"name": "full", "peft_type": "full", "learning_rate": 0.001}
LOFIT = {"name": "LoFiT", "peft_type": "STEER", "site": "heads", "kind": "lofit", "learning_rate": 0.01}
LOFIT |= {"num_heads": 3, "selection_step": 2}
JOLA = {"name": "JoLA", "peft_type": "STEER", "site": "heads", "kind": "jola", "learning_rate": 0.01}


def write_grid(folder: Path, **changes) -> Path:
    grid = {
        "model": "unset",
        "task": "listops_short",
        "limit": 40,
        "train": {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1},
        "methods": [BASE, LORA, STEER],
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({**grid, **changes}))
    return path


def results(folder: Path) -> dict[str, dict]:
    """Results by the name of their method, each with its `adapter`, a folder."""
    found = [json.loads(path.read_text()) for path in (folder / "cells").glob("*.json")]
    adapters = [Store(folder).adapter_path(Cell(**result["cell"])) for result in found]
    return {result["cell"]["name"]: {**result, "adapter": path} for result, path in zip(found, adapters, strict=True)}


# --- the plan ---


def test_a_grid_means_its_cells(tmp_path):
    text = """
    model: some/model
    task: listops_short
    seeds: [0, 1]
    train: {max_steps: 5, weight_decay: 0.0}
    methods:
      - {name: base, peft_type: base}
      - {name: LoRA, peft_type: LORA, r: 4, learning_rate: [1e-3, "2e-3"], train: {max_steps: 7}}
    """
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    cells = load_grid(path, model="another/model").cells("weights")
    assert [(cell.name, cell.learning_rate, cell.seed) for cell in cells] == [
        ("base", 0.0, 0),
        ("LoRA", 0.001, 0),
        ("LoRA", 0.001, 1),
        ("LoRA", 0.002, 0),
        ("LoRA", 0.002, 1),
    ]
    assert cells[1].train == {"max_steps": 7, "weight_decay": 0.0}
    assert cells[1].config == {"peft_type": "LORA", "r": 4, "task_type": "CAUSAL_LM"}
    assert len({cell.key for cell in cells}) == 5
    assert load_grid(path).model == "some/model"


def test_a_cells_key_is_what_defines_its_result(tmp_path):
    def key(**changes) -> str:
        return load_grid(write_grid(tmp_path, **{"methods": [LORA], **changes})).cells("weights")[0].key

    assert key() == key(methods=[{**LORA, "name": "renamed"}])
    changes = [{"limit": 41}, {"split": "validation"}, {"dtype": "bfloat16"}, {"train": {"max_steps": 3}}]
    changes += [{"methods": [{**LORA, field: value}]} for field, value in (("r", 3), ("learning_rate", 0.02))]
    assert len({key(), *(key(**change) for change in changes)}) == 1 + len(changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tsak": "listops"}, r"tsak: unknown key, did you mean 'task'\?"),
        ({"task": None}, "task: is missing"),
        ({"methods": []}, "methods: is missing"),
        ({"split": "tets"}, r"split: 'tets' is none of \('validation', 'test'\)"),
        ({"dtype": "int8"}, "dtype: 'int8' is none of"),
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
        ({"methods": [{**LORA, "learning_rate": "fast"}]}, "method 'LoRA': learning_rate: 'fast' is no number"),
        ({"methods": [{**LORA, "learning_rate": -1.0}]}, "method 'LoRA': learning_rate: -1.0 is not above 0"),
        ({"methods": [{**LORA, "learning_rate": []}]}, "list of learning rates or seeds is empty"),
        ({"methods": [{**FULL, "r": 8}]}, "method 'full': r: unknown key"),
        ({"methods": [{"name": "full", "peft_type": "full"}]}, "method 'full': learning_rate: is missing"),
        ({"methods": [{"name": "LoRA", "peft_type": "LORA"}]}, "method 'LoRA': learning_rate: is missing"),
        ({"methods": [{**BASE, "learning_rate": 1.0}]}, "method 'base': learning_rate: unknown key"),
        ({"train": {"completion_only_loss": False}}, "train: completion_only_loss: is set by the bench itself"),
        ({"methods": [LORA, {**LORA, "r": 3}]}, r"methods: the names \['LoRA'\] occur twice"),
        ({"methods": [LORA, {**LORA, "name": "again"}]}, "'LoRA' and 'again' define the same run"),
        ({"methods": ["LoRA"]}, r"methods\[0\]: expected dict, got 'LoRA'"),
    ],
)
def test_bad_grids(tmp_path, capsys, changes, message):
    path = write_grid(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_grid(path)
    assert str(error.value).startswith(f"{path}: ")
    assert main([str(path), "--output", str(tmp_path / "out")]) == 2
    assert str(error.value) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_yaml(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("model: [")
    with pytest.raises(ValueError, match="is no valid YAML"):
        load_grid(path)


# --- running ---


@pytest.fixture(scope="module")
def finished(tiny_llama, tmp_path_factory):
    """A run with a method that cannot work among the others: its exit code, its folder and its grid."""
    folder = tmp_path_factory.mktemp("finished")
    wrong = {**LORA, "name": "wrong", "target_modules": ["no_such_module"]}
    grid = write_grid(folder, model=tiny_llama, methods=[BASE, wrong, LORA, STEER, FULL, LOFIT, JOLA])
    return main([str(grid), "--output", str(folder / "out")]), folder / "out", grid


def test_a_failing_method_leaves_the_others(finished):
    code, folder, _ = finished
    found = results(folder)
    assert code == 1
    assert {name: result["status"] for name, result in found.items()} == {
        "base": "done",
        "wrong": "failed",
        "LoRA": "done",
        "post-block": "done",
        "full": "done",
        "LoFiT": "done",
        "JoLA": "done",
    }
    assert "no_such_module" in found["wrong"]["error"]
    table = (folder / "table.md").read_text()
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert rows[2:] == ["base", "wrong", "LoRA", "post-block", "full", "LoFiT", "JoLA"]
    assert "- wrong: NoMatchingPeftModuleError" in table


def test_what_is_measured(finished, tiny_llama):
    _, folder, _ = finished
    found = results(folder)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert found["base"]["trainable"] == 0
    assert found["base"]["parameters"] == base.num_parameters()
    # Per block, rank 2: W_down and W_up of width 32.
    assert found["post-block"]["trainable"] == 2 * 2 * (32 + 32)
    assert found["full"]["trainable"] == found["full"]["parameters"] == base.num_parameters()
    assert found["full"]["adapter_bytes"] == 4 * base.num_parameters()
    first, *_, last = (loss for _, loss in found["full"]["loss"])
    assert first == pytest.approx(
        found["LoRA"]["loss"][0][1]
    )  # the same model on the same rows, before the first step
    assert last != pytest.approx(found["LoRA"]["loss"][-1][1])
    assert not (found["full"]["adapter"] / "model.safetensors").exists()
    lofit = load_file(found["LoFiT"]["adapter"] / "adapter_model.safetensors")
    assert sum(int(x.sum()) for name, x in lofit.items() if name.endswith("selected")) == 3
    for name in ("LoRA", "post-block", "LoFiT", "JoLA"):
        result = found[name]
        assert result["metric"] == "acc"
        assert result["n"] == 40
        assert result["stderr"] == pytest.approx((result["score"] * (1 - result["score"]) / 39) ** 0.5, abs=1e-6)
        assert len(result["loss"]) == 3
        assert result["saved_bytes"] > 0
        assert result["peak_bytes"] > 1e8
        adapter = result["adapter"]
        weights = (adapter / "adapter_model.safetensors").stat().st_size
        assert result["adapter_bytes"] == weights > 4 * result["trainable"]
        assert PeftModel.from_pretrained(base, adapter).active_adapter == "default"
        base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    frame = pd.read_csv(folder / "results.csv").set_index("method")
    assert frame.loc["LoRA", "trainable"] == found["LoRA"]["trainable"]
    assert (folder / "figure.png").stat().st_size > 10_000


def test_a_rerun_repeats_only_what_failed(finished, capsys):
    code, folder, grid = finished
    before = {path: (path.stat().st_mtime_ns, path.read_text()) for path in (folder / "cells").iterdir()}
    assert main([str(grid), "--output", str(folder)]) == code == 1
    printed = capsys.readouterr().out
    assert printed.count("finished before") == 6
    for path, (mtime, text) in before.items():
        assert (path.stat().st_mtime_ns == mtime) == ('"status": "done"' in text)


def test_killed_half_way(tiny_llama, tmp_path):
    out = tmp_path / "out"
    grid = write_grid(tmp_path, model=tiny_llama, methods=[BASE, {**LORA, "train": {"max_steps": 100_000}}])
    call = [sys.executable, "-m", "peft_steer.cli", "bench", str(grid), "--output", str(out)]
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ})
    read = b""
    while b"/100000" not in read:  # the second cell's progress bar
        chunk = os.read(process.stderr.fileno(), 4096)
        assert chunk, read.decode()
        read += chunk
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(results(out)) == ["base"]
    assert not list((out / "cells").glob("*.partial"))
    # The trainer must not go on without the run that it belongs to: its end of the pipe closes when it ends.
    deadline = time.monotonic() + 60
    os.set_blocking(process.stderr.fileno(), False)
    while time.monotonic() < deadline:
        try:
            if os.read(process.stderr.fileno(), 65536) == b"":
                break
        except BlockingIOError:
            time.sleep(0.1)
    else:
        pytest.fail("a killed run left its training behind")
    before = (out / "cells" / f"{load_grid(grid).cells(tiny_llama)[0].key}.json").stat().st_mtime_ns
    short = write_grid(tmp_path, model=tiny_llama, methods=[BASE, LORA])
    assert main([str(short), "--output", str(out)]) == 0
    assert set(results(out)) == {"base", "LoRA"}
    assert (out / "cells" / f"{load_grid(short).cells(tiny_llama)[0].key}.json").stat().st_mtime_ns == before


def test_a_broken_result_file_is_named(finished, tmp_path, tiny_llama):
    grid = write_grid(tmp_path, model=tiny_llama, methods=[BASE])
    cell = load_grid(grid).cells(tiny_llama)[0]
    path = Store(tmp_path).result_path(cell)
    path.write_text('{"status": "do')
    with pytest.raises(ValueError, match=f"{path.name} is not a result"):
        Store(tmp_path)


def test_training_learns_the_answers_only(tiny_llama, tmp_path):
    train = {"max_steps": 40, "per_device_train_batch_size": 8, "logging_steps": 1}
    train["train_sampling_strategy"] = "sequential"
    grid = write_grid(tmp_path, model=tiny_llama, train=train, methods=[{**LORA, "r": 8}])
    assert main([str(grid), "--output", str(tmp_path / "out")]) == 0
    losses = [loss for _, loss in results(tmp_path / "out")["LoRA"]["loss"]]
    # The adapter starts as the identity: the first loss is the base's, on the first eight answers and nothing else.
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    documents = tasks.load_task("listops_short")[0].training_docs().select(range(8))
    surprise = []
    for document in documents:
        inputs = tokenizer(f"{document['expression']}=", return_tensors="pt")
        answer = tokenizer(str(document["value"])).input_ids
        surprise.append(-model(**inputs).logits[0, -1].log_softmax(-1)[answer].item())
    assert losses[0] == pytest.approx(sum(surprise) / 8, abs=1e-3)
    assert sum(losses[-5:]) / 5 < losses[0] - 0.5
