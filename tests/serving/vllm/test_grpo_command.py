"""`peft-steer grpo --use_vllm true`: checked before the model is loaded, and before the first step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from engines import environment, save_model


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("base"))


def grpo(base: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"max({i},7)="}) + "\n" for i in range(8)))
    (folder / "rewards.py").write_text("def length(completions, **_):\n    return [len(x) / 9 for x in completions]\n")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"""
model_name_or_path: {base}
dtype: float32
dataset_name: {data}
reward_funcs: [rewards.length]
peft_type: STEER
kind: nonlinear
r: 4
max_steps: 2
per_device_train_batch_size: 4
num_generations: 2
max_completion_length: 4
learning_rate: 0.01
bf16: false
use_cpu: true
report_to: none
gradient_checkpointing: false
use_vllm: true
vllm_mode: colocate
vllm_max_model_length: 64
output_dir: {folder / "out"}
"""
    )
    return subprocess.run(
        [sys.executable, "-m", "peft_steer.commands.cli", "grpo", "--config", str(recipe), *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(),
    )


def test_a_run(base, tmp_path):
    done = grpo(base, tmp_path)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "Pre-flight: vLLM's rollouts follow 3 edits." in done.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--positions", "prompt"], "positions: an engine that follows a training steers all tokens"),
        (["--site", "heads", "--kind", "vector"], "site: vLLM does not steer 'heads'"),
        (["--vllm_mode", "server"], "vllm_mode: 'server' has to be told which model to follow"),
        (["--vllm_enable_sleep_mode", "true"], "vllm_enable_sleep_mode: the engine would lose its base"),
    ],
)
def test_refused(base, tmp_path, arguments, message, monkeypatch, capsys):
    from trl import GRPOConfig

    from peft_steer import SteerConfig
    from peft_steer.train import rollouts

    pairs = dict(zip((a.removeprefix("--") for a in arguments[::2]), arguments[1::2], strict=True))
    training = {name: value for name, value in pairs.items() if name.startswith("vllm_")}
    adapter = {name: value for name, value in pairs.items() if not name.startswith("vllm_")}
    config = GRPOConfig(str(tmp_path), use_vllm=True, bf16=False, use_cpu=True, vllm_mode="colocate")
    for name, value in training.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        rollouts.check_rollouts(config, SteerConfig(**adapter))
