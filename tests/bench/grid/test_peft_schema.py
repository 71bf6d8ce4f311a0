"""What is exported for PEFT's method comparison: its keys, measured numbers, experiments that PEFT reads."""

import json

import pytest
from peft import PeftConfig
from synthetic_bench import cell, failed, result, sweep_and_test

import peft_steer
from peft_steer.bench.grid.peft_schema import export_peft


# Of method_comparison/MetaMathQA in PEFT's repository: what its runner writes, and the fields of its TrainConfig.
TRAIN_CONFIG = {
    *("model_id", "dtype", "max_seq_length", "batch_size", "batch_size_eval", "max_steps", "eval_steps", "compile"),
    *("use_gc", "query_template", "seed", "grad_norm_clip", "optimizer_type", "optimizer_kwargs", "lr_scheduler"),
    *("use_amp", "autocast_adapter_dtype", "generation_kwargs", "attn_implementation", "init_kv_cache_prefix"),
}
RUN_INFO = {"created_at", "total_time", "experiment_name", "peft_branch", "train_config", "peft_config", "error_msg"}
TRAIN_INFO = {
    *("accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th", "train_time"),
    *("file_size", "num_trainable_params", "num_total_params", "status", "metrics"),
}
META_INFO = {"model_info", "dataset_info", "package_info", "system_info", "pytorch_info"}
FINAL = {"step", "test accuracy", "train loss", "train samples", "train total tokens", "forgetting"}
STEER = {"peft_type": "STEER", "kind": "linear", "r": 4, "task_type": "CAUSAL_LM"}
TRAIN = {"max_steps": 500, "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "weight_decay": 0.1}
TRAIN |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "gradient_checkpointing": False}


def export(folder, *pairs):
    return export_peft(*zip(*pairs, strict=True), folder)


def files(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.json"))


def test_a_result(tmp_path):
    made = cell("post-block, linear", 5e-3, config=STEER, train=TRAIN, task="metamathqa")
    memory = {"mean": 3, "max": 5, "p99": 4}
    measured = result(made, 0.4, reserved_bytes=memory, train_samples=4000, created_at="2026-01-01T00:00:00+00:00")
    assert export(tmp_path, (made, measured)) == []
    name = "model-1B-post-block-linear-lr_0.005"
    found = json.loads((tmp_path / f"metamathqa/results/steer--{name}.json").read_text())
    assert set(found) == {"run_info", "train_info", "meta_info", "peft_steer"}
    run, train, meta = found["run_info"], found["train_info"], found["meta_info"]
    assert (set(run), set(train), set(meta)) == (RUN_INFO, TRAIN_INFO, META_INFO)
    assert set(run["train_config"]) == TRAIN_CONFIG
    assert run["experiment_name"] == f"steer/{name}"
    assert run["peft_config"]["peft_type"] == "STEER"
    assert run["peft_config"]["kind"] == "linear"
    assert run["train_config"]["batch_size"] == 8
    assert run["train_config"]["optimizer_kwargs"] == {"lr": 5e-3, "weight_decay": 0.1}
    assert (train["status"], train["num_trainable_params"]) == ("success", measured["trainable"])
    assert (train["train_time"], train["file_size"]) == (measured["train_seconds"], measured["adapter_bytes"])
    assert [train[f"accelerator_memory_{key}"] for key in ("reserved_avg", "max", "reserved_99th")] == [3, 5, 4]
    *logged, final = train["metrics"]
    assert [[entry["step"], entry["train loss"]] for entry in logged] == measured["loss"]
    assert set(final) == FINAL
    assert final["test accuracy"] == measured["score"]
    assert final["train samples"] == 4000
    assert final["forgetting"] == pytest.approx(5e-3)
    assert meta["package_info"]["peft-version"] == "0.21.2"
    assert len(meta["package_info"]) == 10


def test_what_was_not_measured_is_null(tmp_path):
    made = cell("LoRA")
    export(tmp_path, (made, result(made, 0.4, forgetting=None)))
    found = json.loads((tmp_path / "listops_short/results/lora--model-1B-LoRA-lr_0.001.json").read_text())
    assert found["train_info"]["accelerator_memory_max"] is None  # the peak of the process is another quantity
    assert found["train_info"]["metrics"][-1]["forgetting"] is None
    assert found["train_info"]["metrics"][-1]["train samples"] is None
    assert found["run_info"]["total_time"] is None
    assert found["meta_info"]["package_info"]["bitsandbytes-version"] is None
    assert found["peft_steer"]["peak_bytes"] == result(made, 0.4)["peak_bytes"]


def test_an_experiment(tmp_path):
    made = cell("post-block", 5e-3, config=STEER, train=TRAIN, seed=3, quantization={"load_in_4bit": True})
    whole = cell("full", 1e-5, config={"peft_type": "full"}, train=TRAIN, seed=3)
    assert export(tmp_path, (made, result(made, 0.4)), (whole, result(whole, 0.4))) == []
    folder = tmp_path / "listops_short/experiments"
    config = PeftConfig.from_pretrained(folder / "steer/model-1B-post-block-lr_0.005")
    assert isinstance(config, peft_steer.SteerConfig)
    assert (config.kind, config.r, config.task_type) == ("linear", 4, "CAUSAL_LM")
    params = json.loads((folder / "steer/model-1B-post-block-lr_0.005/training_params.json").read_text())
    assert set(params) < TRAIN_CONFIG
    assert params["optimizer_kwargs"] == {"lr": 5e-3, "weight_decay": 0.1}
    assert [params[key] for key in ("batch_size", "max_steps", "lr_scheduler", "seed")] == [8, 500, "cosine", 3]
    assert (params["dtype"], params["eval_steps"], params["use_gc"]) == ("int4", 250, False)
    # Without an adapter_config.json PEFT's runner trains the whole model.
    assert files(folder / "full-finetuning") == ["model-1B-full-lr_1e-05/training_params.json"]
    assert "experiments/TYPE/NAME" in (tmp_path / "listops_short/README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"train": {**TRAIN, "lr_scheduler_type": "linear"}}, "lr_scheduler_type is cosine or constant, not 'linear'"),
        ({"train": {**TRAIN, "warmup_steps": 0.03}}, "its warm-up is 50 of 500 steps, not 15: set warmup_steps"),
        ({"train": {"num_train_epochs": 2}}, "its length is in steps: set max_steps (num_train_epochs is 2)"),
        ({"train": {**TRAIN, "optim": "sgd"}}, "optim: 'sgd' is not one of"),
        (
            {"train": TRAIN, "quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}},
            "with the defaults of BitsAndBytesConfig, without bnb_4bit_quant_type",
        ),
    ],
)
def test_what_the_benchmark_cannot_be_told(tmp_path, changes, reason):
    made = cell("LoRA", **changes)
    (remark,) = export(tmp_path, (made, result(made, 0.4)))
    assert remark.startswith("lora/model-1B-LoRA-lr_0.001: no experiment for PEFT's benchmark: ")
    assert reason in remark
    assert files(tmp_path) == ["listops_short/results/lora--model-1B-LoRA-lr_0.001.json"]


def test_trained_test_cells_alone(tmp_path):
    lost = cell("lost")
    pairs = [(cell("base"), result(cell("base"), 0.2)), (lost, failed()), *sweep_and_test("LoRA", {1e-3: 0.5}, 1e-3)]
    export(tmp_path, *pairs)
    names = [f"listops_short/results/lora--model-1B-LoRA-lr_0.001-seed_{seed}.json" for seed in range(3)]
    assert [name for name in files(tmp_path) if "/results/" in name] == names
