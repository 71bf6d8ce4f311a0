"""The same cells on a Ray cluster: two workers, one of which is killed."""

import logging
import sys
import threading
import time
from dataclasses import replace

import pytest
from bench_cells import LORA, make_cell, measured

from peft_steer.bench.engines import make_engine
from peft_steer.bench.engines.base import EngineError
from peft_steer.bench.scheduler import run_cells
from peft_steer.bench.store import Store, read_training
from peft_steer.utils.errors import UsageError


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes for a cell each."""
    pytest.importorskip("ray")
    from ray._private import services
    from ray.cluster_utils import Cluster

    def patient(*args):
        for _ in range(600):  # Ray itself gives up after 30 seconds, which a busy machine may need
            try:
                return get_node(*args)
            except RuntimeError:
                time.sleep(0.5)
        raise RuntimeError("a Ray node does not start")

    get_node = services.get_node
    monkeypatch.setattr(services, "get_node", patient)
    monkeypatch.setenv("RAY_agent_register_timeout_ms", "300000")
    monkeypatch.setenv("RAY_worker_register_timeout_seconds", "300")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    arguments = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=arguments)
    try:
        cluster.add_node(**arguments)
        yield cluster
    finally:
        cluster.shutdown()


@pytest.mark.multiprocess
@pytest.mark.slow
def test_two_nodes_one_killed(bench_reference, cluster, tmp_path, caplog):
    cells, results, _ = bench_reference
    store = Store(tmp_path)

    def kill_a_node() -> None:
        deadline = time.monotonic() + 300
        while sum(actor.cell is not None for actor in engine._actors) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)

    with caplog.at_level(logging.WARNING), make_engine("ray", address=cluster.address) as engine:
        killer = threading.Thread(target=kill_a_node)
        killer.start()
        assert measured(run_cells(cells, store, engine)) == measured(results)
        killer.join()
        assert "its worker was lost; Ray ran it again" in caplog.text
        # The adapter came back, and goes to whoever evaluates it again.
        lora = cells[2]
        trained = read_training(store.adapter_path(lora))
        assert (store.adapter_path(lora) / "adapter_model.safetensors").exists()
        (again,) = run_cells([replace(lora, split="validation")], store, engine)
        assert again["train_seconds"] == trained["train_seconds"]
        assert again["items"]["ids"] != results[2]["items"]["ids"]
        # What no node has is waited for, and said.
        assert not engine.has_room(replace(lora, gpus=1))
        assert "waiting for a node with 1 GPUs and 1 CPUs; there is none" in caplog.text


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "peft_steer.bench.engines.ray", raising=False)
    with pytest.raises(UsageError, match=r"pip install 'peft-steer\[ray\]'"):
        make_engine("ray")


def test_a_batch_that_cannot_be_divided(tmp_path):
    pytest.importorskip("ray")
    cell = make_cell("unused", "LoRA", LORA, processes=3)
    with pytest.raises(ValueError, match="processes: 3 cannot share batches of 4 x 1 rows"):
        run_cells([cell], Store(tmp_path), make_engine("ray"))


def test_an_address_where_nobody_listens():
    pytest.importorskip("ray")
    with pytest.raises(EngineError, match=r"--address 127\.0\.0\.1:1: no Ray cluster answers there"):
        make_engine("ray", address="127.0.0.1:1").__enter__()
