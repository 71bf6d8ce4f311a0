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
import torch
from grids import BASE, FULL, JOLA, LOFIT, LORA, STEER, cells_of, write_grid
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_steer.bench.grid.plan import Cell
from peft_steer.bench.store import Store
from peft_steer.evaluation import tasks
from peft_steer_cli import main


def results(folder: Path) -> dict[str, dict]:
    """Results by the name of their method, each with its `adapter`, a folder."""
    found = [json.loads(path.read_text()) for path in (folder / "cells").glob("*.json")]
    adapters = [Store(folder).adapter_path(Cell(**result["cell"])) for result in found]
    return {result["cell"]["name"]: {**result, "adapter": path} for result, path in zip(found, adapters, strict=True)}


# --- running ---


@pytest.fixture(scope="module")
def finished(tiny_llama, tmp_path_factory):
    """A run with a method that cannot work among the others: its exit code, its folder and its grid."""
    folder = tmp_path_factory.mktemp("finished")
    # An optimizer that is not installed, which the trainer finds out.
    wrong = {**LORA, "name": "wrong", "train": {"optim": "lomo"}}
    grid = write_grid(folder, model=tiny_llama, methods=[BASE, wrong, LORA, STEER, FULL, LOFIT, JOLA])
    return main(["bench", str(grid), "--output", str(folder / "out")]), folder / "out", grid


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
    assert "lomo" in found["wrong"]["error"]
    table = (folder / "table.md").read_text()
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert rows[2:] == ["base", "wrong", "LoRA", "post-block", "full", "LoFiT", "JoLA"]
    assert "- wrong: ImportError" in table


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


def test_the_report_of_a_run(finished):
    _, folder, _ = finished
    found = results(folder)
    done = [name for name, result in found.items() if result["status"] == "done"]
    pairs = pd.read_csv(folder / "comparisons.csv").set_index(["first", "second"])
    assert {name for pair in pairs.index for name in pair} == set(done)
    assert len(pairs) == len(done) * (len(done) - 1) / 2
    gap = found["base"]["score"] - found["LoRA"]["score"]
    assert pairs.loc[("base", "LoRA"), "difference"] == pytest.approx(gap)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert all(f">{name}</td>" in page for name in found)


def test_a_rerun_repeats_only_what_failed(finished, capsys, tmp_path):
    code, folder, grid = finished
    before = {path: (path.stat().st_mtime_ns, path.read_text()) for path in (folder / "cells").iterdir()}
    assert main(["bench", str(grid), "--output", str(folder), "--export-peft", str(tmp_path)]) == code == 1
    printed = capsys.readouterr().out
    assert printed.count("finished before") == 6
    for path, (mtime, text) in before.items():
        assert (path.stat().st_mtime_ns == mtime) == ('"status": "done"' in text)
    (lora,) = (tmp_path / "listops_short" / "results").glob("lora--*-LoRA-lr_0.01.json")
    exported = json.loads(lora.read_text())
    train, final = exported["train_info"], exported["train_info"]["metrics"][-1]
    if not torch.cuda.is_available():
        assert train["accelerator_memory_max"] == train["accelerator_memory_reserved_avg"] == 0
    assert (final["train samples"], final["train total tokens"]) == (12, results(folder)["LoRA"]["train_tokens"])
    assert exported["run_info"]["total_time"] > train["train_time"] > 0
    assert exported["run_info"]["created_at"].endswith("+00:00")
    # Three steps with a linear schedule and no warm-up: PEFT's benchmark has no such schedule.
    assert "LoRA-lr_0.01: no experiment for PEFT's benchmark: its lr_scheduler_type is cosine or constant" in printed


@pytest.mark.multiprocess
@pytest.mark.slow
def test_killed_half_way(tiny_llama, tmp_path):
    out = tmp_path / "out"
    grid = write_grid(tmp_path, model=tiny_llama, methods=[BASE, {**LORA, "train": {"max_steps": 100_000}}])
    call = [sys.executable, "-m", "peft_steer.commands.cli", "bench", str(grid), "--output", str(out)]
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
    before = (out / "cells" / f"{cells_of(grid)[0].key}.json").stat().st_mtime_ns
    short = write_grid(tmp_path, model=tiny_llama, methods=[BASE, LORA])
    assert main(["bench", str(short), "--output", str(out)]) == 0
    assert set(results(out)) == {"base", "LoRA"}
    assert (out / "cells" / f"{cells_of(short)[0].key}.json").stat().st_mtime_ns == before


def test_a_broken_result_file_is_named(finished, tmp_path, tiny_llama):
    grid = write_grid(tmp_path, model=tiny_llama, methods=[BASE])
    cell = cells_of(grid)[0]
    path = Store(tmp_path).result_path(cell)
    path.write_text('{"status": "do')
    with pytest.raises(ValueError, match=f"{path.name} is not a result"):
        Store(tmp_path)


def test_training_learns_the_answers_only(tiny_llama, tmp_path):
    train = {"max_steps": 40, "per_device_train_batch_size": 8, "logging_steps": 1}
    train["train_sampling_strategy"] = "sequential"
    grid = write_grid(tmp_path, model=tiny_llama, train=train, methods=[{**LORA, "r": 8}])
    assert main(["bench", str(grid), "--output", str(tmp_path / "out")]) == 0
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
