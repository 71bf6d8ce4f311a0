"""JoLA: gates, penalty and schedule against the paper's formulas written plainly; recomputation, trainers, files."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from head_training import edits, sft, sgd
from peft import PeftConfig, PeftModel, get_peft_model
from tiny import inputs, make, randomize, steer_layers
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import disable_dropout_in_model

from peft_steer import JolaConfig


def jola(std=0.3, **config):
    model = get_peft_model(make(), JolaConfig(**config))
    randomize(model, std=std)
    return model


def gates(log_g1, log_g2, seed):
    """Both training gates from one seed, by the paper's formula."""
    torch.manual_seed(seed)
    found = []
    for log_g in (log_g1, log_g2):
        u = (1 - 2e-6) * torch.rand(len(log_g)) + 1e-6
        s = torch.sigmoid((torch.log(u) - torch.log(1 - u) + log_g) / 0.33)
        found.append(torch.clamp(1.2 * s - 0.1, 0, 1))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_by_the_equation(dtype):
    """One draw for each head and gate, shared by rows and tokens; in float32 whatever the gates are stored in."""
    (edit, *_) = edits(jola())
    edit.to(dtype).train()
    z = torch.randn(3, 7, 32)
    g1, g2 = gates(edit.log_g1.float(), edit.log_g2.float(), seed=5)
    heads = z.unflatten(-1, (4, 8))
    expected = (1 + g2[:, None] * edit.A.float()) * heads + g1[:, None] * edit.v.float()
    torch.manual_seed(5)
    torch.testing.assert_close(edit(z), expected.flatten(-2), rtol=1e-5, atol=1e-6)
    torch.manual_seed(6)
    assert not torch.allclose(edit(z), expected.flatten(-2))


def test_gradients_by_the_equation():
    (edit, *_) = edits(jola())
    edit.double().train()
    z = torch.randn(5, 32, dtype=torch.float64)
    torch.manual_seed(5)
    g1, g2 = edit.gates()
    plain = ((1 + g2[:, None] * edit.A) * z.unflatten(-1, (4, 8)) + g1[:, None] * edit.v).flatten(-2)
    parameters = list(edit.parameters())
    expected = torch.autograd.grad(plain.square().sum(), parameters, allow_unused=True)
    torch.manual_seed(5)
    found = torch.autograd.grad(edit(z).square().sum(), parameters)
    assert any(g.any() for g in expected[2:])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_start_is_the_base_whatever_the_gates():
    model = get_peft_model(make(), JolaConfig())
    x, plain = inputs(), make()(**inputs()).logits
    assert torch.equal(model.train()(**x).logits, plain)
    assert torch.equal(model.eval()(**x).logits, plain)
    for edit in edits(model):
        bound = math.sqrt(6 / 5)
        assert all(0 < log_g.abs().max() <= bound for log_g in (edit.log_g1, edit.log_g2))
        assert any(g.any() for g in edit.gates())


def test_evaluation_is_not_random():
    model = jola().eval()
    assert torch.equal(model(**inputs()).logits, model(**inputs()).logits)
    model.train()
    assert not torch.equal(model(**inputs()).logits, model(**inputs()).logits)


@pytest.mark.parametrize("how", ["reference", "no dropout"])
def test_what_is_not_to_be_random_is_not(how):
    """A reference copy, which takes no gradient, draws nothing in training mode; nor does a policy whose dropout is
    turned off, as TRL's `disable_dropout` does. Neither moves the random state."""
    model = jola()
    want = model.eval()(**inputs()).logits
    model = copy.deepcopy(model).train()
    if how == "reference":
        model.requires_grad_(False)
    else:
        disable_dropout_in_model(model)
    state = torch.get_rng_state()
    assert torch.equal(model(**inputs()).logits, want)
    assert torch.equal(torch.get_rng_state(), state)
    if how == "no dropout":  # the gates still learn
        model(**inputs()).logits.square().sum().backward()
        assert all(edit.log_g1.grad.any() for edit in edits(model))


def test_the_first_loss_of_dpo(tmp_path, tiny_llama):
    """Policy and reference agree before the first update: ln 2, exactly."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="float32"), JolaConfig(task_type="CAUSAL_LM")
    )
    randomize(model, std=0.5)
    rows = [{"prompt": f"{a}+1=", "chosen": str(a + 1), "rejected": str(a + 2)} for a in range(4)]
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(tmp_path), max_steps=1, logging_steps=1, report_to="none", use_cpu=True, bf16=False,
            disable_tqdm=True, save_strategy="no",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
    )  # fmt: skip
    trainer.train()
    first = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    assert first == pytest.approx(math.log(2), abs=1e-5)


def test_merging_while_training_folds_in_the_gates_of_evaluation():
    model = jola().eval()
    expected = model(**inputs()).logits
    model.train()
    model.merge_adapter()
    torch.testing.assert_close(model.eval()(**inputs()).logits, expected, rtol=1e-3, atol=1e-4)


# What is configured, and `lambda` after `t` steps.
SCHEDULES = {
    "the default": ({}, lambda t: 0.1 * math.exp(-0.01 * t)),
    "exponential": (
        {"gate_schedule": "exponential", "gate_lambda": 0.9, "gate_steps": 2},
        lambda t: 0.9 * math.exp(-0.5 * t),
    ),
    "linear": ({"gate_schedule": "linear", "gate_steps": 4}, lambda t: 0.0 + (0.2 - 0.0) * min(t / 4, 1)),
    "past its end": (
        {"gate_schedule": "linear", "gate_lambda": 0.8, "gate_steps": 1},
        lambda t: [0.0, 0.8, 0.8][t],
    ),
    "cyclic": ({"gate_schedule": "cyclic"}, lambda t: 0.5 + 0.5 * math.sin(2 * math.pi * t / 20)),
    "a short cycle": ({"gate_schedule": "cyclic", "gate_steps": 4}, lambda t: [0.5, 1.0, 0.5][t]),
    "constant": ({"gate_schedule": "constant"}, lambda t: 0.1),
    "another constant": ({"gate_schedule": "constant", "gate_lambda": 1}, lambda t: 1.0),
}


def penalty(model, weight):
    """`[lambda sum_l mean_h p1 + (1 - lambda) sum_l mean_h p2] / (L H)`."""
    sums = [
        sum(torch.sigmoid(getattr(edit, name) + 0.33 * math.log(11)).mean() for edit in edits(model))
        for name in ("log_g1", "log_g2")
    ]
    return (weight * sums[0] + (1 - weight) * sums[1]) / (3 * 4)


def test_some_tokens_alone():
    """In training too: the gates of the pass at these tokens, nothing elsewhere, and the same gates recomputed."""
    x, gradients = inputs(), []
    for checkpointing in (False, True):
        model = jola(positions="f2+l1").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        layer = next(iter(steer_layers(model).values()))
        seen = []
        layer.register_forward_hook(lambda m, args, out, seen=seen: seen.append((args[0], out)))
        torch.manual_seed(5)
        loss = model(**x, labels=x["input_ids"], prompt_lengths=[6, 5]).loss
        z, out = seen[0]
        edit = layer.steer_edit["default"]
        g1, g2 = gates(edit.log_g1, edit.log_g2, seed=5)
        want = ((1 + g2[:, None] * edit.A) * z.unflatten(-1, (4, 8)) + g1[:, None] * edit.v).flatten(-2)
        chosen = torch.zeros(2, 7, dtype=torch.bool)
        chosen[0, [0, 1, 5]] = chosen[1, [0, 1, 4]] = True
        torch.testing.assert_close(out, torch.where(chosen[..., None], want, z), rtol=1e-5, atol=1e-6)
        loss.backward()
        gradients.append([p.grad for edit in edits(model) for p in (edit.A, edit.v)])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(("name", "batches"), [("the default", 2), *((name, 1) for name in SCHEDULES)])
def test_the_penalty_and_its_schedule(name, batches):
    """Updates whose loss has no gradient are those of the penalty alone, with the lambda of the step."""
    config, weight = SCHEDULES[name]
    model = jola(**config).train()
    optimizer = sgd(model, lr=10.0)
    for t in range(3):
        log_gs = [getattr(edit, name) for edit in edits(model) for name in ("log_g1", "log_g2")]
        gradients = torch.autograd.grad(penalty(model, weight(t)), log_gs)
        expected = [p - 10.0 * g for p, g in zip(log_gs, gradients, strict=True)]
        for _ in range(batches):
            (0.0 * model(**inputs()).logits.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        for p, value in zip(log_gs, expected, strict=True):
            torch.testing.assert_close(p, value, rtol=1e-5, atol=1e-7)
    assert {int(edit.steps) for edit in edits(model)} == {3}


def test_the_schedule_is_saved_with_the_adapter(tmp_path):
    for name, (config, _) in SCHEDULES.items():
        saved = JolaConfig(**config)
        saved.save_pretrained(tmp_path / name)
        loaded = PeftConfig.from_pretrained(tmp_path / name)
        assert all(getattr(loaded, field) == value for field, value in config.items())
        assert loaded.to_dict() == saved.to_dict()
    config = JolaConfig()
    assert (config.gate_schedule, config.gate_lambda, config.gate_steps) == ("exponential", 0.1, 100)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"gate_schedule": "expon"}, r"`gate_schedule='expon'` is unknown; choose one of 'exponential', 'linear'"),
        ({"gate_schedule": "linear"}, r"`gate_schedule='linear'` needs `gate_steps`"),
        ({"gate_schedule": "cyclic", "gate_lambda": 0.1}, r"`gate_lambda=0.1` contradicts `gate_schedule='cyclic'`"),
        ({"gate_schedule": "constant", "gate_steps": 9}, r"`gate_steps=9` contradicts `gate_schedule='constant'`"),
        ({"gate_lambda": 1.5}, r"`gate_lambda=1.5` must be at most 1"),
        ({"gate_lambda": -0.1}, r"`gate_lambda=-0.1` must be a finite number of at least 0"),
        ({"gate_steps": 0}, r"`gate_steps=0` must be an integer of at least 1"),
        ({"kind": "lofit", "gate_lambda": 0.1}, r"`gate_lambda=0.1` contradicts `kind='lofit'`: only kind='jola'"),
    ],
)
def test_schedules_that_contradict_themselves(config, message):
    with pytest.raises(ValueError, match=message):
        JolaConfig(**config)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_same_gates_again(reentrant):
    x, gradients = inputs(), []
    for checkpointing in (False, True):
        model = jola().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(0)
        model(**x, labels=x["input_ids"]).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*gradients, strict=True))


def test_sft_and_resume(tmp_path, tiny_llama):
    config = {"kind": "jola", "gate_schedule": "cyclic", "gate_steps": 5}
    whole = sft(tiny_llama, tmp_path / "whole", **config)
    resumed = sft(tiny_llama, tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-2"), **config)
    expected = {k: x for k, x in whole.model.state_dict().items() if "steer_edit" in k}
    assert {int(x) for k, x in expected.items() if k.endswith("steps")} == {6}
    assert all(torch.equal(x, expected[k]) for k, x in resumed.model.state_dict().items() if "steer_edit" in k)
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="float32"), tmp_path / "whole" / "checkpoint-6"
    )
    assert all(torch.equal(x, expected[k]) for k, x in loaded.state_dict().items() if "steer_edit" in k)
