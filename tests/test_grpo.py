"""TRL's GRPOTrainer samples its rollouts from the policy that it trains: the steered one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from test_bases import BASES
from tiny import KINDS, METHODS, randomize
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer


PROMPTS = ["max(3,7)=", "min(5,2,8)=", "max(1,4)=", "min(6,9,0,3)="]  # of several lengths, so that rows are padded


class Recorder:
    """Each step's importance ratios: of the training forward's probability of every sampled token to the one that it
    was sampled with."""

    def __init__(self, model: torch.nn.Module):
        self.ratios: list[torch.Tensor] = []
        self.generate, self._sequences, self._logps = model.generate, None, None
        model.generate = self._record_generation
        model.register_forward_hook(self._record_training, with_kwargs=True)

    def _record_generation(self, **kwargs):
        out = self.generate(**kwargs, return_dict_in_generate=True, output_scores=True)
        self._sequences = out.sequences
        scores = torch.stack(out.scores, 1).float()
        sampled = out.sequences[:, -scores.shape[1] :, None]
        self._logps = scores.log_softmax(-1).gather(-1, sampled).squeeze(-1)
        return out.sequences

    def _record_training(self, module, args, kwargs, output):
        if torch.is_grad_enabled():
            same = (kwargs["input_ids"][:, None] == self._sequences).all(-1)  # the trainer shuffles its rollouts
            assert same.any(1).all()
            length = self._logps.shape[1]
            ratio = (output.log_probs.detach()[:, -length:] - self._logps[same.int().argmax(1)]).exp()
            self.ratios.append(ratio[output.label_mask[:, -length:]])  # nothing after an end-of-text token counts


def vowels(completions, **_):
    return [sum(character in "aeiou" for character in text) / 4 + 0.1 * len(text) for text in completions]


def grpo(tiny_llama, output, config, base="fp32", **options):
    """A trainer whose adapter has random weights, and the recorder of its log-probabilities."""
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_llama, **BASES[base]),
        reward_funcs=vowels,
        args=GRPOConfig(
            output_dir=str(output),
            report_to="none",
            use_cpu=True,
            bf16=False,
            seed=3,
            max_steps=2,
            learning_rate=0.1,
            warmup_steps=0,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=6,
            temperature=0.7,
            logging_steps=1,
            save_strategy="no",
            **options,
        ),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
        peft_config=config,
    )
    randomize(trainer.model)
    return trainer, Recorder(trainer.model)


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
    script = Path(__file__).parents[1] / "recipes" / "smollm2-135m" / "grpo" / "plot_reward.py"
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
