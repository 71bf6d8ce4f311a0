"""`peft-steer analyze joint`: overlaps of subspaces that are known, and the halves' scores."""

import pandas as pd
import pytest
import tiny
import torch
from command_line import peft_steer
from joint_models import by_qr, joint
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_steer import JointSteerLoraConfig
from peft_steer.analysis.joint import overlaps, subspace_overlap
from peft_steer.evaluation.tasks import load_task


def test_overlap_of_known_subspaces():
    E = torch.eye(6, dtype=torch.float64)
    assert subspace_overlap(E[:, :2], E[:, 2:5]) == pytest.approx(0)
    assert subspace_overlap(E[:, :2], E[:, 1:4]) == pytest.approx(0.5)  # one of two directions is shared
    assert subspace_overlap(3 * E[:, :2] @ torch.randn(2, 2).double(), E[:, :4]) == pytest.approx(1)
    assert subspace_overlap(torch.cat([E[:, :1], 2 * E[:, :1]], dim=1), E[:, :1]) == pytest.approx(1)
    assert subspace_overlap(torch.cat([E[:, :1], 2 * E[:, :1]], dim=1), E[:, 1:]) == pytest.approx(0)
    tilted = torch.cos(torch.tensor(0.3)) * E[:, :1] + torch.sin(torch.tensor(0.3)) * E[:, 1:2]
    assert subspace_overlap(tilted, E[:, :1]) == pytest.approx(torch.cos(torch.tensor(0.3)).item() ** 2)
    assert torch.isnan(torch.tensor(subspace_overlap(torch.zeros(6, 2).double(), E[:, :1])))


def test_chance_is_that_of_random_subspaces():
    model = joint(orthogonal="none", r=4, steer_r=2)
    draws = []
    for seed in range(12):
        tiny.randomize(model, std=0.5, seed=seed)
        draws.append(overlaps(model))
    table = pd.concat(draws)
    assert table["chance"].iloc[0] == 4 / tiny.D
    for name in ("lora_steering_reads", "lora_steering_writes"):
        assert table[name].mean() == pytest.approx(4 / tiny.D, rel=0.25)
    assert table["steering_reads_writes"].mean() == pytest.approx(2 / tiny.D, rel=0.4)


def test_orthogonal_reading_is_seen_and_the_directions_are_the_right_ones():
    model = joint(orthogonal="always", lora_alpha=12, steer_scale=0.5)
    tiny.randomize(model, std=0.5)
    table = overlaps(model)
    assert len(table) == 3
    assert (table["lora_steering_reads"] < 1e-9).all()
    layer = model.get_base_model().model.layers[1]
    A, B = (getattr(layer.mlp.down_proj, name)["default"].weight.double() for name in ("lora_A", "lora_B"))
    edit = layer.steering.steer_edit["default"]
    size_steering = 0.5 * (edit.W_up.double() @ by_qr(edit.W_down, B)).norm()
    assert table["size_lora"][1] == pytest.approx(12 / 4 * (B @ A).norm().item())
    assert table["size_steering"][1] == pytest.approx(size_steering.item())
    with torch.no_grad():
        layer.steering.steer_edit["default"].W_up.copy_(layer.mlp.down_proj.lora_B["default"].weight)
    assert overlaps(model)["lora_steering_writes"].tolist()[1] == pytest.approx(1)


@pytest.fixture(scope="module")
def adapter(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint")
    config = JointSteerLoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = tiny.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config)
    tiny.randomize(model, std=0.3)
    model.save_pretrained(folder)
    return str(folder)


def test_command(tiny_llama, adapter, tmp_path):
    words = ["--base", tiny_llama, "--adapter", adapter, "--task", "listops_short", "--limit", "40"]
    assert peft_steer("analyze", "joint", *words, "--output", tmp_path) == 0
    found = pd.read_csv(tmp_path / "joint_scores.csv").set_index("halves")["score"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), adapter).eval()
    for halves, expected in found.items():
        with model.disable_adapter() if halves == "neither" else model.base_model.set_halves(halves):
            assert _accuracy(model, tiny_llama) == pytest.approx(expected)
    assert found.nunique() > 1
    assert len(pd.read_csv(tmp_path / "joint_overlap.csv")) == 2
    assert (tmp_path / "joint.png").is_file()


def _accuracy(model, folder: str) -> float:
    tokenizer, docs = AutoTokenizer.from_pretrained(folder), list(load_task("listops_short")[0].test_docs())[:40]
    digits = [tokenizer(str(digit)).input_ids[0] for digit in range(10)]
    right = 0
    for doc in docs:
        with torch.no_grad():
            logits = model(**tokenizer(f"{doc['expression']}=", return_tensors="pt")).logits[0, -1, digits]
        right += int(logits.argmax()) == int(doc["value"])
    return right / len(docs)


def test_refused(tiny_llama, adapter, tmp_path, capsys):
    plain = tiny.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), tiny.SteerConfig(r=2))
    plain.save_pretrained(tmp_path / "plain")
    for words, message in (
        (["--adapter", str(tmp_path / "plain"), "--task", "listops_short"], "not a joint one"),
        (["--adapter", str(tmp_path), "--task", "listops"], "has no adapter_config.json that PEFT can read"),
        (["--adapter", adapter, "--task", "listops", "--num_fewshot", "1"], "task 'listops' says 0"),
        (["--adapter", adapter, "--task", "listops", "--limit", "0"], "argument --limit: must be at least 1, not 0"),
    ):
        assert peft_steer("analyze", "joint", "--base", tiny_llama, *words, "--output", tmp_path) == 2
        assert message in capsys.readouterr().err
