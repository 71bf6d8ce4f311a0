"""`peft-steer sft`, `grpo` and `dpo`, run to the end on a tiny model with TRL's trainers."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import lm_eval
import paper_data
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.rewards import accuracy_reward

from peft_steer.evaluation import tasks
from peft_steer.evaluation.datasets import grpo_dataset
from peft_steer.train import dpo, grpo, sft
from peft_steer.train.card import last_metrics


STEER = {"peft_type": "STEER", "kind": "nonlinear", "r": 2}
JOINT = {"peft_type": "JOINT_STEER_LORA", "r": 2, "target_modules": "all-linear", "steer_r": 2}
ADAPTERS = {
    "vector": {"peft_type": "STEER", "kind": "vector"},
    "post_block": STEER,
    "loreft": {"peft_type": "STEER", "kind": "loreft", "site": "mlp", "r": 2},
    "joint": JOINT,
    "joint_periodic": {**JOINT, "orthogonal": "periodic", "orthogonal_interval": 2, "steer_learning_rate": 0.02},
    "lora": {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"},
}
GRPO = {"num_generations": 2, "max_completion_length": 3}


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ADAPTERS)
def test_sft_resumed_is_bit_equal_to_sft_in_one_go(name, run):
    keys = {**ADAPTERS[name], "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = run(sft, "whole", **keys)
    resumed = run(sft, "resumed", **keys, resume_from_checkpoint=str(whole / "checkpoint-2"))
    assert (resumed / "checkpoint-4").exists()
    assert not (resumed / "checkpoint-2").exists()  # it did go on, and did not begin again
    first, second = state(whole), state(resumed)
    assert first.keys() == second.keys()
    for key, x in first.items():
        assert torch.equal(x, second[key]), key
        assert not torch.equal(x, load_file(whole / "checkpoint-2" / "adapter_model.safetensors")[key]), key


@pytest.mark.parametrize("command", [sft, grpo, dpo])
@pytest.mark.parametrize("name", ["post_block", "joint"])
def test_what_is_saved_is_what_was_trained_and_the_card_says_how_to_load_it(
    command, name, run, tiny_llama, caplog, capsys
):
    trainer = command.__name__.rsplit(".", 1)[-1]
    out = run(command, **ADAPTERS[name], **(GRPO if command is grpo else {}))
    assert "Pre-flight: 2 steered modules" in caplog.text
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    ids = torch.tensor([[5, 6, 7]])
    before = base(ids).logits
    loaded = PeftModel.from_pretrained(base, out)
    assert state(out)
    if command is not grpo:  # its rewards are all zero here
        assert not torch.equal(loaded(ids).logits, before)
    assert f"pretrained={tiny_llama},peft={out},dtype=float32,tokenizer={out} --tasks sums_" in capsys.readouterr().out
    card = (out / "README.md").read_text()
    task = "sums_text" if command is grpo else "sums_choice"
    for text in ("import peft_steer", tiny_llama, f"{trainer.upper()}, 2 steps", f"`{task}`", "library_name: peft"):
        assert text in card
    assert f"{ADAPTERS[name]['peft_type']} (" in card
    snippet = card.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(snippet, names)
    assert torch.equal(names["model"](ids).logits, loaded(ids).logits)
    AutoPeftModelForCausalLM.from_pretrained(out)


def test_two_learning_rates(run):
    out = run(sft, **JOINT, max_steps=1, learning_rate=0.0, steer_learning_rate=0.01)
    weights = state(out)
    lora_b = [x for name, x in weights.items() if "lora_B" in name]
    assert lora_b
    assert all(not x.any() for x in lora_b)
    steering = [x for name, x in weights.items() if ".steering." in name and "W_down" not in name]
    assert steering
    assert all(x.any() for x in steering)


def test_the_whole_model_without_an_adapter(run, tiny_llama):
    out = run(sft)
    trained = load_file(out / "model.safetensors")
    base = load_file(Path(tiny_llama) / "model.safetensors")
    assert trained.keys() == base.keys()
    assert all(not torch.equal(x, base[name]) for name, x in trained.items())
    assert "peft=" not in (out / "README.md").read_text()


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
        {"neftune_noise_alpha": 5},
        {"gradient_checkpointing": True},
        {"load_in_4bit": True, "use_bnb_nested_quant": True},
        {"load_in_8bit": True},
        {"task": "sums_text", "max_length": 8},
    ],
    ids=lambda options: next(iter(options)),
)
def test_trl_options(options, run):
    before = state(run(sft, "still", **STEER, **{**options, "learning_rate": 0.0}))
    after = state(run(sft, "moved", **STEER, **options))
    assert all(not torch.equal(after[name], x) for name, x in before.items())


def test_gsm8k_with_the_papers_rewards(run, tmp_path, tiny_llama):
    """lm-eval's own task on a local file with its columns, math-verify and a format as rewards."""
    rows = [{"question": f"{i} + 1?", "answer": f"One more than {i}.\n#### {i + 1}"} for i in range(8)]
    (tmp_path / "gsm8k.json").write_text("\n".join(map(json.dumps, rows)))
    gsm8k = {"include": str(Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"), "task": "gsm8k_local"}
    files = {"data_files": dict.fromkeys(("train", "test"), str(tmp_path / "gsm8k.json"))}
    local = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": files}
    (tmp_path / "tasks" / "gsm8k.yaml").write_text(json.dumps({**gsm8k, **local}))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    chatty = tmp_path / "chatty"
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(chatty)
    tokenizer.save_pretrained(chatty)
    keys = {"task": "gsm8k_local", "num_fewshot": 0, "apply_chat_template": True, "model_name_or_path": str(chatty)}
    rewards = {"reward_funcs": ["accuracy_reward", "think_format_reward", "task"], "reward_weights": [1, 0.2, 1]}
    out = run(grpo, **STEER, **GRPO, **keys, **rewards, save_strategy="steps", save_steps=2)
    log = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())["log_history"][0]
    names = ("accuracy_reward", "think_format_reward", "exact_match,strict-match")
    assert all(f"rewards/{name}/mean" in log for name in names)
    task, _ = tasks.load_task("gsm8k_local", str(tmp_path / "tasks"), num_fewshot=0)
    data = grpo_dataset(task, apply_chat_template=True)
    assert list(data["solution"]) == [str(i + 1) for i in range(8)]
    right = [[{"role": "assistant", "content": f"So \\boxed{{{i + 1}}}"}] for i in range(8)]
    assert accuracy_reward(right, list(data["solution"])) == [1.0] * 8
    assert accuracy_reward(right[1:], list(data["solution"])[:-1]) == [0.0] * 7


@pytest.mark.parametrize("command", [sft, dpo])
def test_a_task_of_the_paper(command, run, tmp_path, capsys):
    metadata = {"data_dir": str(paper_data.write(tmp_path / "data"))}
    run(command, **STEER, task="steer_boolq", include_path=None, metadata=metadata)
    words = shlex.split(capsys.readouterr().out.split("To evaluate it:\n")[1])
    assert words[words.index("--tasks") + 1] == "steer_boolq"
    assert json.loads(words[words.index("--metadata") + 1]) == metadata


def test_chat_messages(run, tiny_llama, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    assert state(run(sft, **STEER, apply_chat_template=True, chat_template_path=str(template)))


def test_early_stopping(run):
    keys = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 9}
    out = run(sft, **STEER, **keys, learning_rate=0.0, load_best_model_at_end=True, early_stopping_patience=2)
    assert json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())["global_step"] == 3
    assert not (out / "checkpoint-4").exists()


def test_an_adapter_trained_further_starts_from_its_weights(run):
    first = run(sft, "first", **STEER)
    still = run(sft, "still", model_name_or_path=None, adapter_name_or_path=str(first), learning_rate=0.0)
    assert all(torch.equal(x, state(first)[name]) for name, x in state(still).items())
    on = run(sft, "on", adapter_name_or_path=str(first))
    assert all(not torch.equal(x, state(first)[name]) for name, x in state(on).items())


def test_local_files_as_data(run, tmp_path):
    rows = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    keys = {"task": None, "include_path": None, "dataset_name": str(tmp_path / "data.jsonl")}
    assert state(run(sft, **STEER, **keys))
    run(sft, "none", expect=2, **STEER, **keys, dataset_train_split="dev")


def test_grpo_logs_the_task_metric(run):
    out = run(grpo, **STEER, **GRPO, save_strategy="steps", save_steps=2)
    log = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert all("rewards/exact_match,none/mean" in entry for entry in log[:2])


@pytest.mark.parametrize("command", [sft, grpo])
def test_preflight_refuses_an_adapter_that_does_not_act(command, run):
    with pytest.raises(RuntimeError, match="logits do not change with the adapter's weights"):
        run(command, **STEER, scale=0.0, **(GRPO if command is grpo else {}))


def test_preflight_refuses_a_loss_that_is_not_finite(run, tiny_llama, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in Path(tiny_llama).iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="the loss is nan before the first step"):
        run(sft, **STEER, model_name_or_path=str(broken))


def test_what_max_length_leaves_out_is_reported(run, capsys):
    with pytest.raises(AssertionError, match="2 == 0"):  # the exit code
        run(sft, **STEER, task="sums_text", max_length=2)
    assert "max_length: no example has a token to learn" in capsys.readouterr().err


def test_out_of_memory_says_what_helps(run, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("trl.SFTTrainer.train", full)
    with pytest.raises(RuntimeError, match="gradient_accumulation_steps"):
        run(sft, **STEER)


def test_the_last_value_of_each_metric():
    history = [{"loss": 2.0, "step": 1}, {"loss": 1.0, "epoch": 1}, {"eval_loss": 3.0}, {"train_runtime": 1}]
    assert last_metrics(history) == {"loss": 1.0, "eval_loss": 3.0}


@pytest.mark.slow
def test_the_printed_command_evaluates(run, capsys):
    out = run(sft, **STEER, load_in_4bit=True, positions="last")
    printed = capsys.readouterr().out.split("To evaluate it:\n")[1]
    words = shlex.split(printed)[1:]
    call = [sys.executable, "-m", "peft_steer.commands.cli", *words, "--output_path", str(out / "scores.json")]
    result = subprocess.run(call, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    (scores,) = out.glob("**/scores*.json")
    assert "acc,none" in json.loads(scores.read_text())["results"]["sums_choice"]
