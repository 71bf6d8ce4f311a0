"""TRL's GRPOTrainer samples its rollouts from the policy that it trains: the steered one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rollouts import grpo
from tiny import KINDS, METHODS


CASES = [("steer", kind, "block", "fp32") for kind in ("vector", "linear_bias", "silu", "loreft")]
CASES += [("steer", "loreft", "mlp", "fp32"), ("joint", "silu", "block", "fp32")]
CASES = [(*case, checkpointing) for case in CASES for checkpointing in (False, True)]
CASES += [("steer", "silu", "block", "nf4", False), ("steer", "silu", "block", "int8", True)]


@pytest.mark.parametrize(("method", "kind", "site", "base", "checkpointing"), CASES)
def test_rollouts_come_from_the_steered_policy(tmp_path, tiny_llama, method, kind, site, base, checkpointing):
    """The importance ratio is 1 at the first step, and at the second, after the adapter has moved."""
    config = METHODS[method](r=4, site=site, task_type="CAUSAL_LM", **KINDS[kind])
    trainer, recorder = grpo(tiny_llama, tmp_path, config, base, gradient_checkpointing=checkpointing)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert all(not torch.equal(before[n], p) for n, p in trainer.model.named_parameters() if p.requires_grad)
    assert len(recorder.ratios) == 2
    for ratio in recorder.ratios:
        assert len(ratio) > 24
        torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-4, rtol=0)


def test_rollouts_of_the_base_would_be_seen(tmp_path, tiny_llama):
    """The check above fails where generation misses the adapter."""
    trainer, recorder = grpo(tiny_llama, tmp_path, METHODS["steer"](r=4, task_type="CAUSAL_LM"))
    steered = recorder.generate

    def base_generates(**kwargs):
        with trainer.model.disable_adapter():
            return steered(**kwargs)

    recorder.generate = base_generates
    trainer.train()
    assert all((ratio - 1).abs().max() > 0.1 for ratio in recorder.ratios)


def test_the_reward_figure(tmp_path):
    """The script of the README's figure reads the last checkpoint's history of every run."""
    script = Path(__file__).parents[2] / "recipes" / "smollm2-135m" / "grpo" / "plot_reward.py"
    for seed, last in ((0, 9), (1, 10)):
        for step in (9, last):
            state = tmp_path / f"seed-{seed}" / f"checkpoint-{step}" / "trainer_state.json"
            state.parent.mkdir(parents=True, exist_ok=True)
            history = [{"step": i, "reward": i / 20} for i in range(1, step + 1)]
            state.write_text(json.dumps({"log_history": [*history, {"step": step, "train_loss": 0.1}]}))
    (tmp_path / "empty").mkdir()
    runs = [str(tmp_path / name) for name in ("seed-0", "seed-1", "empty")]
    svg = tmp_path / "reward.svg"
    subprocess.run([sys.executable, script, *runs[:2], "--output", svg], check=True)
    assert all(text in svg.read_text() for text in ("seed-0", "seed-1", "mean of 2", "optimizer step"))
    failed = subprocess.run([sys.executable, script, *runs, "--output", svg], capture_output=True, text=True)
    assert failed.returncode != 0
    assert "empty has no checkpoint-*/trainer_state.json" in failed.stderr
