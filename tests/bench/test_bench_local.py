"""Cells on this machine: what is run, by whom, and what is left when somebody is killed."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import bench_cells
import pytest
from bench_cells import LORA, make_cell, measured

from peft_steer.bench.engines import local, make_engine
from peft_steer.bench.engines.local import LocalEngine
from peft_steer.bench.scheduler import run_cells
from peft_steer.bench.store import Store


def test_a_failed_cell_leaves_the_others(bench_reference):
    cells, results, store = bench_reference
    assert [result["status"] for result in results] == ["done", "failed", "done", "done"]
    assert "no_such_module" in results[1]["error"]
    assert "Traceback" in results[1]["traceback"]
    assert results == [{k: v for k, v in store.read(cell).items() if k != "cell"} for cell in cells]
    assert len(results[3]["loss"]) == 2


@pytest.mark.multiprocess
@pytest.mark.slow
def test_two_at_a_time_and_a_killed_worker(bench_reference, tiny_llama, tmp_path, capfd):
    cells, results, _ = bench_reference
    endless = make_cell(tiny_llama, "endless", LORA, train={"max_steps": 10**6, "per_device_train_batch_size": 1})
    store = Store(tmp_path)
    killed = []

    def kill_the_endless() -> None:
        wait_for(store.log_path(endless), "/1000000")
        killed.append(next(slot.process.pid for slot in engine._slots if slot.cell == endless))
        os.kill(killed[0], signal.SIGKILL)

    with make_engine(jobs=2) as engine:
        killer = threading.Thread(target=kill_the_endless)
        killer.start()
        lost, *others = run_cells([endless, *cells], store, engine)
        killer.join()
        workers = [slot.process.pid for slot in engine._slots if slot.process is not None]
        run_cells(cells[1:2], store, engine)
        assert engine._slots[0].process is None  # who failed is not used again
    assert lost["status"] == "failed"
    assert "exit code -9" in lost["error"]
    assert not store.adapter_path(endless).exists()
    assert measured(others) == measured(results)
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == 2 * 5 + 2
    assert "[5/5]" in out
    assert "no_such_module" not in err  # what several print at a time would be unreadable
    assert "no_such_module" in store.log_path(cells[1]).read_text()
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_two_runners_and_one_is_killed(bench_reference, tmp_path, capfd):
    """Each cell is run by one of them, but for the one that the killed runner had begun."""
    cells, results, _ = bench_reference
    script = bench_cells.__file__
    log = tmp_path / "log"
    with log.open("wb") as file:
        other = subprocess.Popen([sys.executable, script, cells[0].source, tmp_path / "out"], stdout=file)
    wait_for(log, "[1/4] listops_short, test: base:")
    moment = random.uniform(0, 6)
    print(f"killed after {moment:.2f} s")
    threading.Timer(moment, other.kill).start()
    store = Store(tmp_path / "out")
    with make_engine() as engine:
        assert measured(run_cells(cells, store, engine)) == measured(results)
    other.wait()
    theirs, ours = (begun_and_ended(text) for text in (log.read_text(), capfd.readouterr().out))
    assert theirs[0] & ours[0] <= theirs[0] - theirs[1]
    assert len(theirs[0] & ours[0]) <= 1
    assert not theirs[1] & ours[1]
    # What was finished stays as it is; what failed before is tried again.
    stamps = {cell.key: store.stamp(cell) for cell in cells}
    with make_engine() as engine:
        assert measured(run_cells(cells, store, engine)) == measured(results)
    assert [cell.name for cell in cells if store.stamp(cell) != stamps[cell.key]] == ["wrong"]


def begun_and_ended(output: str) -> tuple[set[str], set[str]]:
    """The cells that a runner began, and of these the ones that it ended."""
    lines = [line.split("] ", 1)[1] for line in output.splitlines() if line.startswith("[")]
    begun = {line for line in lines if line.count(": ") == 1}
    return begun, {line for line in begun if any(other.startswith(f"{line}: ") for other in lines)}


@pytest.mark.multiprocess
def test_runners_wait_for_each_other(bench_reference, tiny_llama, tmp_path, capsys):
    cells, _, _ = bench_reference
    store, cell = Store(tmp_path), cells[0]
    lock = store.lock(cell)

    def finish() -> None:
        store.write(cell, {"status": "done", "metric": "acc", "score": 0.25})
        lock.release()

    threading.Timer(1.5, finish).start()
    with make_engine() as engine:
        (result,) = run_cells([cell], store, engine)
    assert result["score"] == 0.25
    assert "1 cells are run by another runner" in capsys.readouterr().out


@pytest.mark.multiprocess
@pytest.mark.slow
def test_processes_that_train_a_cell_together(bench_reference, tmp_path):
    cells, results, _ = bench_reference
    together = [replace(cell, processes=2) for cell in cells if cell.name in ("wrong", "steering")]
    with make_engine() as engine:
        wrong, steering = run_cells(together, Store(tmp_path), engine)
    assert "no_such_module" in wrong["error"]
    expected = results[3]
    assert steering["loss"] == [[step, pytest.approx(loss, rel=1e-3)] for step, loss in expected["loss"]]
    assert {k: steering[k] for k in ("score", "n", "trainable")} == {
        k: expected[k] for k in ("score", "n", "trainable")
    }
    assert (Store(tmp_path).adapter_path(together[1]) / "adapter_model.safetensors").exists()


def test_gpus_are_divided_among_the_jobs():
    assert local._shares(["0", "1", "2", "3"], 2) == [["0", "1"], ["2", "3"]]
    assert local._shares(["0", "1"], 3) == [["0"], ["1"], ["0"]]
    assert local._shares([], 2) == [[], []]


@pytest.mark.parametrize(
    ("visible", "jobs", "changes", "message"),
    [
        ([], 1, {"gpus": 0.5}, "needs 1 GPUs, and each of 1 jobs has 0; `gpus: 0` runs it on the CPU"),
        (["0", "1"], 2, {"gpus": 2}, "needs 2 GPUs, and each of 2 jobs has 1; use fewer --jobs"),
        (["0"], 1, {"processes": 4}, "needs 4 GPUs, and each of 1 jobs has 1; use --engine ray"),
        ([], 1, {"processes": 3}, r"processes: 3 cannot share batches of 4 x 1 rows .* multiple of 3"),
    ],
)
def test_cells_that_do_not_fit_this_machine(monkeypatch, tmp_path, visible, jobs, changes, message):
    monkeypatch.setattr(local, "visible_accelerators", lambda: visible)
    with pytest.raises(ValueError, match=message):
        run_cells([make_cell("unused", "LoRA", LORA, **changes)], Store(tmp_path), LocalEngine(jobs))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"jobs": 0}, "--jobs 0: at least one"),
        ({"name": "slurm"}, "--engine slurm: must be 'local' or 'ray'"),
        ({"address": "auto"}, "--address auto: only --engine ray has one"),
    ],
)
def test_engines_that_do_not_exist(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_engine(**arguments)


def wait_for(path: Path, text: str) -> None:
    deadline = time.monotonic() + 300
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < deadline, f"no {text!r} in {path}"
        time.sleep(0.05)
