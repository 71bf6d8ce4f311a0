"""The configurations of accelerate that we ship, launched on two CPU processes, with TRL's trainer as it is."""

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import scale_worker
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from scale_worker import JOBS, sft


CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate_configs"
NAMES = ("single", "ddp", "fsdp2", "fsdp2_checkpointing", "deepspeed_zero2", "deepspeed_zero3")
CPU = {"use_cpu": True, "num_processes": 2, "mixed_precision": "no"}
# adapters by engine, and whether their training is resumed as well
PROJECTED = ("vector", "nonlinear", "positions", "loreft", "joint", "lora")
# DeepSpeed trains copies of the parameters: of a joint adapter's projections only those in the forward pass reach them
UNPROJECTED = ("nonlinear", "joint_free", "lora")
RUNS = {
    "ddp": dict.fromkeys(PROJECTED, False) | {"joint": True},
    "fsdp2": dict.fromkeys(PROJECTED, False) | {"joint": True},
    "fsdp2_checkpointing": {"nonlinear": False, "joint": False},
    "deepspeed_zero2": dict.fromkeys(UNPROJECTED, False),
    "deepspeed_zero3": dict.fromkeys(UNPROJECTED, False),
}


def test_every_config_is_shipped():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_reads_the_config(name):
    text = (CONFIGS / f"{name}.yaml").read_text()
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))  # refuses unknown keys
    assert f"accelerate launch --config_file recipes/accelerate_configs/{name}.yaml" in text
    engine = {"single": "NO", "ddp": "MULTI_GPU"}.get(name, name.partition("_")[0].removesuffix("2").upper())
    assert config.distributed_type.value == engine
    assert config.mixed_precision == "bf16"


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_llama) -> Path:
    folder = tmp_path_factory.mktemp("scale")
    (folder / "base").symlink_to(tiny_llama)
    return folder


@pytest.fixture(scope="module")
def expected(base) -> dict[str, dict[str, torch.Tensor]]:
    """The adapters that one process trains, with the same global batch."""
    for job in JOBS:
        sft(base, job, base / job)
    return {job: load_file(base / job / "adapter_model.safetensors") for job in JOBS}


@pytest.fixture(scope="module", params=RUNS)
def launched(request, tmp_path_factory, base) -> tuple[str, Path]:
    """An engine, and the folder in which it has trained its adapters."""
    if request.param.startswith("deepspeed") and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "base").symlink_to((base / "base").resolve())
    (folder / "jobs.json").write_text(json.dumps(RUNS[request.param]))
    config = yaml.safe_load((CONFIGS / f"{request.param}.yaml").read_text()) | CPU
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "config.yaml")]
    command += [
        "--main_process_port",
        str(port),
        scale_worker.__file__,
        str(folder),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-6000:]
    return request.param, folder


@pytest.mark.multiprocess
@pytest.mark.slow
def test_adapters_equal_those_of_one_process(launched, expected):
    engine, folder = launched
    report = json.loads((folder / "report.json").read_text())
    for job in RUNS[engine]:
        found = load_file(folder / job / "adapter_model.safetensors")
        assert found.keys() == expected[job].keys()
        for name, x in found.items():
            assert (x - expected[job][name]).abs().max() < 1e-6, (job, name)
        assert report[job]["is_peft"]
        if engine == "ddp":
            assert report[job]["wrapper"] == "DistributedDataParallel"
        elif engine.startswith("fsdp2"):
            assert (report[job]["engine"], report[job]["dtensors"]) == ("FSDP", 1.0)
        else:
            assert (report[job]["engine"], report[job]["wrapper"]) == ("DEEPSPEED", "DeepSpeedEngine")


@pytest.mark.multiprocess
@pytest.mark.slow
def test_resumed(launched):
    engine, folder = launched
    for job in [job for job, resumed in RUNS[engine].items() if resumed]:
        whole = load_file(folder / job / "adapter_model.safetensors")
        resumed = load_file(folder / f"{job}_resumed" / "adapter_model.safetensors")
        assert all(torch.equal(x, whole[name]) for name, x in resumed.items())
