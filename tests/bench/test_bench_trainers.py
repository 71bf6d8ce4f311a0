"""Cells trained by reinforcement and by preference: what is recorded, what is saved, what a killed run keeps."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import trainer_cells
import yaml
from bench_cells import LORA, STEER, make_cell
from peft import PeftModel
from trainer_cells import GRPO, grpo_cell, some_cells
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_steer.bench.engines import make_engine
from peft_steer.bench.run import training
from peft_steer.bench.run.cell import Runner
from peft_steer.bench.run.divergence import divergence
from peft_steer.bench.run.prompts import task_of
from peft_steer.bench.run.trainers import grpo
from peft_steer.bench.scheduler import run_cells
from peft_steer.bench.store import Store
from peft_steer.evaluation import tasks
from peft_steer.evaluation.lm import PeftSteerLM
from peft_steer.evaluation.tasks import pair_of
from peft_steer_cli import main


RECIPES = Path(__file__).parents[2] / "recipes" / "bench"


@pytest.fixture(scope="module")
def runner():
    return Runner()


@pytest.fixture
def rewarded(monkeypatch):
    """A reward that a random model gets now and then: the share of characters before "P"."""

    def reward(completions, **_):
        return [sum(character < "P" for character in text) / max(1, len(text)) for text in completions]

    monkeypatch.setattr(grpo, "rewards", lambda *_: [reward])


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("steering", STEER),
        ("prompt only", {**STEER, "kind": "vector", "positions": "prompt"}),
        ("TinyLoRA", {"peft_type": "TINYLORA", "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}),
        ("VeRA", {"peft_type": "VERA", "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}),
        ("full", {"peft_type": "full"}),
    ],
)
def test_what_is_recorded_of_reinforcement(runner, rewarded, tiny_llama, tmp_path, name, config):
    cell = grpo_cell(tiny_llama, name, config, learning_rate=1e-2, kl_prompts=4)
    result = runner(cell, tmp_path / "adapter")
    curves = result["curves"]
    assert [step for step, _ in curves["reward"]] == [1, 2, 3]
    assert 0 < max(value for _, value in curves["reward"]) <= 1
    assert result["length"] == curves["length"][-1][1] <= GRPO["max_completion_length"]
    assert result["train_samples"] == 3 * 4
    assert result["rollout_tokens_per_second"] > 0
    # AdamW keeps two moments in float32 and a step count for each tensor.
    moments = 8 * result["trainable"]
    assert moments < result["optimizer_bytes"] <= moments + 4 * 40
    assert 0 < result["optimizer_share"] < 1
    assert result["kl"] > 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists() == (name != "full")
    if name != "full":  # what was saved is what was trained: an evaluation alone scores the same
        again = runner(cell, tmp_path / "adapter")
        assert again["curves"]["reward"] == [list(point) for point in curves["reward"]]
        assert again["kl"] == pytest.approx(result["kl"], rel=1e-4)


def test_the_adapter_is_what_is_rewarded(runner, rewarded, tiny_llama, tmp_path):
    """Sixty steps make the rewarded characters likely."""
    train = {**GRPO, "max_steps": 60, "per_device_train_batch_size": 16, "num_generations": 8, "weight_decay": 0.0}
    cell = grpo_cell(tiny_llama, "steering", {**STEER, "kind": "vector"}, learning_rate=0.3, train=train)
    curve = [value for _, value in runner(cell, tmp_path / "adapter")["curves"]["reward"]]
    assert sum(curve[-10:]) / 10 > sum(curve[:10]) / 10 + 0.2


def test_what_is_recorded_of_preference(runner, tiny_llama, tmp_path):
    cell = make_cell(tiny_llama, "preferred", STEER, trainer="dpo", learning_rate=0.05)
    result = runner(cell, tmp_path / "adapter")
    assert [step for step, _ in result["curves"]["margin"]] == [1, 2]
    assert result["curves"]["margin"][0][1] == 0  # nothing is preferred before the first step
    assert result["curves"]["margin"][1][1] != 0
    assert result["loss"][0][1] == pytest.approx(0.6931, abs=1e-4)
    assert result["train_samples"] == 8


def test_full_fine_tuning_after_an_adapter_trains(tiny_llama, tmp_path):
    """Both have the same weights below them, which the adapter has frozen."""
    train = {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1}
    full = make_cell(tiny_llama, "full", {"peft_type": "full"}, learning_rate=1e-2, train=train)
    alone = Runner()(full, tmp_path / "alone")["loss"]
    runner = Runner()
    runner(make_cell(tiny_llama, "LoRA", LORA, train=train), tmp_path / "LoRA")
    after = runner(full, tmp_path / "after")["loss"]
    assert after == alone


def test_the_two_rates_of_a_joint_adapter(runner, tiny_llama, tmp_path):
    """A half whose rate is next to nothing stays where it was."""
    config = {"peft_type": "JOINT_STEER_LORA", "r": 2, "target_modules": "all-linear", "steer_r": 2}
    config |= {"steer_learning_rate": 1e-12, "task_type": "CAUSAL_LM"}
    runner(make_cell(tiny_llama, "joint", config, learning_rate=1e-2), tmp_path / "adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "adapter")
    change = {"lora": 0.0, "steer": 0.0}
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            change["lora"] = max(change["lora"], parameter.abs().max().item())
        elif name.endswith("W_up"):  # zero at the start, too
            change["steer"] = max(change["steer"], parameter.abs().max().item())
    assert change["lora"] > 1e-3
    assert 0 < change["steer"] < 1e-9


def test_the_divergence_is_the_plain_equation(tiny_llama, tmp_path, runner):
    """One row at a time, without a cache and without padding, from the tokens that were sampled."""
    config = {**STEER, "kind": "vector"}
    cell = grpo_cell(tiny_llama, "s", config, trainer="sft", train={"max_steps": 2}, learning_rate=0.3, kl_prompts=5)
    runner(cell, tmp_path / "adapter")
    base, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    copy = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model, task = PeftModel.from_pretrained(copy, tmp_path / "adapter"), task_of(cell)
    drawn = []
    generate = model.generate

    def recording(**arguments):
        drawn.append(generate(**arguments))
        return drawn[-1]

    model.generate = recording
    found = divergence(model, base, tokenizer, task, cell)
    n_prompt, total, count = drawn[0].sequences.shape[1] - len(drawn[0].logits), 0.0, 0
    for row, doc in zip(drawn[0].sequences, list(task.eval_docs), strict=False):
        prompt = tokenizer(pair_of(task, doc)[0], return_tensors="pt").input_ids[0]
        for token in range(n_prompt, len(row)):
            ids = torch.cat([prompt, row[n_prompt:token]])[None]
            with torch.no_grad():
                p, q = (m(input_ids=ids).logits[0, -1].double().log_softmax(-1) for m in (model, base))
            total, count = total + (p.exp() * (p - q)).sum().item(), count + 1
            if row[token] == tokenizer.eos_token_id:
                break
    assert found == {"kl": pytest.approx(total / count, rel=1e-4), "kl_tokens": count}
    assert found["kl"] > 1e-3
    with model.disable_adapter():
        assert divergence(model, base, tokenizer, task, cell)["kl"] == pytest.approx(0, abs=1e-6)


def test_tasks_that_are_kept(runner, tiny_llama, tmp_path):
    entries = [{"name": "listops_short", "limit": 6, "metadata": {}}]
    cells = [grpo_cell(tiny_llama, name, config, retention=entries) for name, config in (("base", {}), ("s", STEER))]
    base, steered = (runner(cell, tmp_path / cell.name)["retention"]["listops_short"] for cell in cells)
    assert base["n"] == steered["n"] == 6
    assert base["items"]["ids"] == steered["items"]["ids"]
    assert base["score"] == sum(base["items"]["scores"]) / 6


def test_a_group_is_kept_as_one_task(runner, tiny_llama, tmp_path, monkeypatch):
    """Its score is the mean over all items of its tasks, however many each has."""
    shutil.copytree(tasks.OUR_TASKS / "listops", tmp_path / "listops")
    (tmp_path / "listops" / "both.yaml").write_text("group: both\ntask: [listops_short, list_max_min]\n")
    monkeypatch.setattr(tasks, "OUR_TASKS", tmp_path)
    entries = [{"name": name, "limit": 6, "metadata": {}} for name in ("both", "listops_short", "list_max_min")]
    found = runner(grpo_cell(tiny_llama, "base", {}, retention=entries), tmp_path / "none")["retention"]
    both, short, lists = (found[entry["name"]] for entry in entries)
    assert both["n"] == 12
    assert both["score"] == pytest.approx((short["score"] + lists["score"]) / 2)
    assert both["items"]["scores"] == short["items"]["scores"] + lists["items"]["scores"]
    assert both["items"]["ids"][0] == f"listops_short:{short['items']['ids'][0]}"


def test_a_killed_run_by_reinforcement_goes_on(tiny_llama, tmp_path):
    """What was finished is not run again; of what was not, nothing is left that a later run would take for whole."""
    done, endless = some_cells(tiny_llama)
    store = Store(tmp_path / "out")
    script = trainer_cells.__file__
    process = subprocess.Popen([sys.executable, script, tiny_llama, store.directory], start_new_session=True)
    lock = store.directory / "locks" / f"{endless.training_key}.lock"
    deadline = time.monotonic() + 300
    while not (store.result_path(done).exists() and lock.exists()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    stamp = store.stamp(done)
    short = grpo_cell(tiny_llama, "LoRA", LORA)
    with make_engine() as engine:
        first, second = run_cells([done, short], store, engine)
    assert first["status"] == second["status"] == "done"
    assert store.stamp(done) == stamp
    assert [step for step, _ in second["curves"]["reward"]] == [1, 2, 3]
    assert not store.adapter_path(endless).exists()


@pytest.mark.slow
def test_the_shipped_grid_runs(tiny_llama, tmp_path, capsys):
    """`recipes/bench/rl_135m.yaml`, but for its sizes: a rate chosen on validation, reinforcement beside answers."""
    few = {"n_train": 64, "n_validation": 16, "n_test": 16}
    grid = yaml.safe_load((RECIPES / "rl_135m.yaml").read_text())
    grid |= {"choose": {"limit": 4, "train": {"max_steps": 1}}, "seeds": [0], "kl_prompts": 2}
    grid |= {"task": {"name": grid["task"], "limit": 4, "metadata": few}}
    grid |= {"retention": [{"name": "listops_short", "limit": 2, "metadata": few}]}
    grid["train"] |= {"max_steps": 2, "per_device_train_batch_size": 8}
    rates = {"base": None, "vector": [5e-3, 1e-2], "LoRA r=1, SFT": 2e-3}
    grid["methods"] = [method for method in grid["methods"] if method["name"] in rates]
    for method in grid["methods"][1:]:
        method["learning_rate"] = rates[method["name"]]
    (tmp_path / "plain_text.txt").write_text("Nothing is forgotten. " * 20)
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    command = ["bench", str(tmp_path / "grid.yaml"), "--model", tiny_llama, "--output", str(tmp_path / "out")]
    assert main(command) == 0
    assert "5 runs: 2 to choose on validation, 3 after it." in capsys.readouterr().out
    table = (tmp_path / "out" / "table.md").read_text()
    assert all(f"| {name} " in table for name in rates)
    assert main(command) == 0
    assert capsys.readouterr().out.count(": finished before: ") == 5


@pytest.mark.parametrize("trainer", ["sft", "grpo"])
def test_conversations(trainer, tiny_llama, tmp_path, monkeypatch):
    """With a chat template the model is trained on the prompt that it is scored with."""
    shutil.copytree(tiny_llama, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    prompt = {"num_fewshot": 0, "apply_chat_template": True, "system_instruction": "Count."}
    trained, scored = [], []
    make, generate = training._TRAINERS[trainer].make, PeftSteerLM.generate_until

    def recording(*args):
        made = make(*args)
        row = made.train_dataset[0]
        trained.append(
            row["input_ids"]
            if trainer == "sft"
            else tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        )
        return made

    def scoring(self, requests, **kwargs):
        scored.extend(request.args[0] for request in requests)
        return generate(self, requests, **kwargs)

    monkeypatch.setattr(training._TRAINERS[trainer], "make", recording)
    monkeypatch.setattr(PeftSteerLM, "generate_until", scoring)
    train = GRPO if trainer == "grpo" else {"max_steps": 1, "per_device_train_batch_size": 4}
    cell = grpo_cell(
        str(tmp_path / "model"), "chat", STEER, trainer=trainer, train=train, prompt=prompt, kl_prompts=2, limit=2
    )
    result = Runner()(cell, tmp_path / "adapter")
    assert result["kl_tokens"] > 0
    shape = re.compile(r"<system>Count\.<eos><user>m(ax|in)\([\d,]+\)=<eos><assistant>")
    assert len(scored) == 2
    assert all(shape.fullmatch(text) for text in scored)
    text = tokenizer.decode(trained[0])
    assert shape.match(text)
    assert bool(shape.fullmatch(text)) == (trainer == "grpo")  # supervised: the answer follows
