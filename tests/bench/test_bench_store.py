"""The benchmark's results directory: whole files or none, locks, and what is refused."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from bench_cells import LORA, make_cell

from peft_steer.bench.store import Store, read_training, save_training


CELL = make_cell("unused", "LoRA", LORA)
OTHER = make_cell("unused", "LoRA", LORA, seed=1)


def test_what_is_written_is_read(tmp_path):
    store = Store(tmp_path / "out")
    assert store.read(CELL) is None
    assert store.stamp(CELL) is None
    store.write(CELL, {"status": "failed", "error": "why"})
    before = store.stamp(CELL)
    store.write(CELL, {"status": "done", "score": 0.5})
    assert store.stamp(CELL) != before
    again = Store(tmp_path / "out")
    assert again.read(CELL) == {"cell": vars(CELL), "status": "done", "score": 0.5}
    assert again.read(OTHER) is None
    assert [path.name for path in (tmp_path / "out" / "cells").iterdir()] == [f"{CELL.key}.json"]


@pytest.mark.parametrize("text", ['{"status": "done", "sc', "", '{"score": 1}', '{"status": "fine"}', "[]"])
def test_a_broken_result_is_named(tmp_path, text):
    store = Store(tmp_path)
    path = store.result_path(CELL)
    path.write_text(text)
    for read in (lambda: Store(tmp_path), lambda: store.read(CELL)):
        with pytest.raises(ValueError, match=f"{path} is not a result .*remove it to run the cell again"):
            read()


def test_another_version_is_refused(tmp_path):
    Store(tmp_path)
    version = tmp_path / "bench.json"
    assert json.loads(version.read_text()) == {"version": 2}
    version.write_text('{"version": 3}')
    with pytest.raises(ValueError, match=r"version 3 of .* this is version 2.*--output"):
        Store(tmp_path)
    version.write_text('{"vers')
    with pytest.raises(ValueError, match=r"bench\.json is not what peft-steer bench writes"):
        Store(tmp_path)


def test_a_directory_of_before_there_were_versions_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("other files are no harm")
    (tmp_path / "cells").mkdir()
    Store(tmp_path)
    (tmp_path / "bench.json").unlink()
    (tmp_path / "cells" / "0123456789abcdef.json").write_text('{"status": "done"}')
    with pytest.raises(ValueError, match=r"version 1 of .* this is version 2"):
        Store(tmp_path)
    assert not (tmp_path / "bench.json").exists()


def test_an_adapter_is_there_as_a_whole_or_not_at_all(tmp_path):
    path = Store(tmp_path).adapter_path(CELL)
    assert read_training(path) is None

    def fails(folder):
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_training(path, fails, {})
    assert list(path.parent.iterdir()) == []
    save_training(path, lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"all"), {"seconds": 1.5})
    assert read_training(path) == {"seconds": 1.5}
    assert (path / "adapter_model.safetensors").read_bytes() == b"all"
    assert [p.name for p in path.parent.iterdir()] == [CELL.training_key]
    (path / "training.json").write_text("{")
    with pytest.raises(ValueError, match=f"{path} is not a trained adapter of this bench"):
        read_training(path)


def test_cells_that_differ_in_their_evaluation_share_adapter_and_lock(tmp_path):
    store = Store(tmp_path)
    test, sweep = CELL, make_cell("unused", "LoRA", LORA, split="validation", limit=3)
    assert store.adapter_path(test) == store.adapter_path(sweep) != store.adapter_path(OTHER)
    assert store.result_path(test) != store.result_path(sweep)
    lock = store.lock(test)
    assert store.lock(sweep) is None
    assert store.lock(OTHER) is not None
    lock.release()
    assert store.lock(sweep) is not None


def test_a_dead_holders_lock_is_free_and_what_it_left_is_removed(tmp_path):
    store = Store(tmp_path)
    holder = (
        "import sys, time, filelock\nlock = filelock.FileLock(sys.argv[1])\nlock.acquire()\n"
        "print('held', flush=True)\ntime.sleep(600)"
    )
    path = tmp_path / "locks" / f"{CELL.training_key}.lock"
    process = subprocess.Popen([sys.executable, "-c", holder, str(path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    left = [tmp_path / "cells" / f"{cell.key}.json.1.partial" for cell in (CELL, OTHER)]
    for folder in left:
        folder.mkdir()
    (tmp_path / "adapters" / f"{CELL.training_key}.xyz.partial").mkdir()
    assert store.lock(CELL) is None
    process.kill()
    process.wait()
    assert store.lock(CELL) is not None
    assert not left[0].exists()
    assert left[1].exists()
    assert list((tmp_path / "adapters").iterdir()) == []


@pytest.mark.multiprocess
def test_killed_in_the_middle_of_writing(tmp_path):
    """Whatever the moment, each file is of one writing, and each adapter complete."""
    store = Store(tmp_path)
    draw = random.Random(0)
    for _ in range(20):
        process = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(tmp_path,))
        process.start()
        time.sleep(draw.uniform(0.005, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert store.lock(CELL) is not None
        result = Store(tmp_path).read(CELL)
        assert result is None or len(set(result["numbers"])) == 1
        for adapter in (tmp_path / "adapters").iterdir():
            if not adapter.name.endswith(".partial"):
                assert read_training(adapter) == {"size": (adapter / "weights").stat().st_size}


def write_for_ever(directory) -> None:
    store, number = Store(directory), random.randrange(2**30)
    while True:
        number += 1
        store.write(CELL, {"status": "done", "numbers": [number] * 5000})
        size = random.randrange(1, 10**6)
        save_training(
            directory / "adapters" / str(number),
            lambda folder, size=size: (folder / "weights").write_bytes(bytes(size)),
            {"size": size},
        )
