"""`peft-steer lm-eval`: several adapters, each with the files of a run of its own; on two processes."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import harness
import pytest
import torch
import transformers as tf
from harness import FEW, files_of, scores
from peft import LoraConfig
from saved import save_adapter

from peft_steer import JointSteerLoraConfig, PostBlockSteerConfig


LM = {"task_type": "CAUSAL_LM", "r": 2}
ADAPTERS = {
    "lora": LoraConfig(target_modules="all-linear", **LM),
    "last": PostBlockSteerConfig(positions="last", **LM),
    "joint": JointSteerLoraConfig(steer_r=2, target_modules="all-linear", **LM),
}


@pytest.fixture(scope="module")
def adapters(tiny_llama, tmp_path_factory) -> dict[str, str]:
    return {name: save_adapter(tiny_llama, config, tmp_path_factory.mktemp(name)) for name, config in ADAPTERS.items()}


def test_several_adapters_on_one_base(tiny_llama, adapters, command, tmp_path, monkeypatch):
    loads = []
    load = tf.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(tf.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: loads.append(a) or load(*a, **k))
    folders = list(adapters.values())
    common = ["--tasks", "listops_short", "--limit", 5, "--device", "cpu", "--log_samples", "--model", "peft-steer"]
    common += ["--use_cache", tmp_path / "cache", *FEW]
    together = ["--model_args", f"pretrained={tiny_llama},scale=0.5,peft=[{','.join(folders)},None]"]
    assert command(*common, *together, "--output_path", tmp_path / "together") == 0
    assert len(loads) == 1
    found = []
    for folder in [None, *folders]:
        model_args = {"pretrained": tiny_llama} | ({"peft": folder, "scale": 0.5} if folder else {})
        alone = ["--model_args", json.dumps(model_args), "--use_cache", tmp_path / str(len(loads))]
        assert command(*common, *alone, "--output_path", tmp_path / "alone") == 0
        results, samples = files_of(tmp_path / "together", folder or tiny_llama)
        expected, expected_samples = files_of(tmp_path / "alone", folder or tiny_llama)
        assert results["results"] == expected["results"]
        assert results["config"] == {**expected["config"], "use_cache": results["config"]["use_cache"]}
        assert scores(samples) == scores(expected_samples)
        found.append(scores(samples))
    assert len(loads) == 5
    assert all(a != b for i, a in enumerate(found) for b in found[:i])


def test_a_configuration_file(tiny_llama, adapters, command, tmp_path):
    values = {"model": "peft-steer", "model_args": {"pretrained": tiny_llama, "peft": [adapters["lora"], None]}}
    values |= {"tasks": ["listops_short"], "limit": 2, "device": "cpu", "output_path": str(tmp_path / "out")}
    values["metadata"] = {"n_train": 8, "n_validation": 8, "n_test": 8}
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    assert command("run", "--config", tmp_path / "run.yaml") == 0
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.parametrize(
    ("model", "peft", "message"),
    [
        ("hf", "[{lora},{joint}]", "several adapters need `--model peft-steer`"),
        ("peft-steer", "[{lora},{lora}]", "each only once"),
        ("peft-steer", "[]", "at least one"),
        ("peft-steer", "[{lora},3]", "3 is neither an adapter's path nor None"),
        ("peft-steer", "[{lora},{lora}_missing]", "_missing"),
    ],
)
def test_bad_lists_of_adapters(tiny_llama, adapters, command, capsys, model, peft, message):
    arguments = ["--model", model, "--model_args", f"pretrained={tiny_llama},peft={peft.format(**adapters)}"]
    assert command(*arguments, "--tasks", "listops_short") == 2
    assert message in capsys.readouterr().err


@pytest.mark.multiprocess
@pytest.mark.slow
def test_two_processes(tiny_llama, adapters, command, tmp_path):
    """`accelerate launch` on CPUs: each process evaluates a part of the documents, one writes all the results."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    config = {"distributed_type": "MULTI_GPU", "use_cpu": True, "num_processes": 2, "mixed_precision": "no"}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", tmp_path / "config.yaml"]
    launch += ["--main_process_port", port, Path(harness.__file__).with_name("harness_worker.py")]
    arguments = ["--model", "peft-steer", "--tasks", "listops_short,list_max_min", "--limit", 5, "--log_samples"]
    arguments += ["--batch_size", "auto", "--max_batch_size", 4, "--device", "cpu"]
    arguments += [
        "--model_args",
        f"pretrained={tiny_llama},peft=[{adapters['last']},{adapters['lora']}]",
        "--output_path",
    ]
    run = subprocess.run(
        [str(word) for word in [*launch, *arguments, tmp_path / "two"]], capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-6000:]
    assert command(*arguments, tmp_path / "one") == 0
    for name in ("last", "lora"):
        (results, samples), (expected, expected_samples) = (
            files_of(tmp_path / count, adapters[name]) for count in ("two", "one")
        )
        assert results["results"] == expected["results"]
        assert results["n-samples"] == expected["n-samples"]
        assert sorted(sample["doc_id"] for sample in samples) == list(range(5))
        torch.testing.assert_close(
            torch.tensor(scores(samples)), torch.tensor(scores(expected_samples)), rtol=0, atol=1e-4
        )
