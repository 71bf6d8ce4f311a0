"""LoFiT: the penalty of its first stage, the choice of heads, the second stage; in trainers, copies and files."""

import copy
from functools import partial

import pytest
import torch
import two_processes
from head_training import edits, sft, sgd
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from tiny import inputs, make, randomize
from transformers import AutoModelForCausalLM

from peft_steer import LofitConfig, acting_parameters


def lofit(architecture="llama", std=0.1, **config):
    model = get_peft_model(make(architecture), LofitConfig(**config)).train()
    randomize(model, std=std)
    return model


def step(model, optimizer, **kwargs):
    x = inputs(rows=4, **kwargs)
    model(**x, labels=x["input_ids"]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def loss_of(model, x, how):
    if how == "labels":
        return model(**x, labels=x["input_ids"]).loss
    logits = model(**x).logits[:, :-1]  # as DPO and GRPO: a loss of their own
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), x["input_ids"][:, 1:].flatten())


@pytest.mark.parametrize("how", ["labels", "logits"])
@pytest.mark.parametrize("batches", [1, 2])
def test_the_penalty(how, batches):
    """One update is that of the loss plus `lambda sum |A|`, by autograd, whoever computes the loss, and however many
    backward passes it takes."""
    model = lofit(l1_lambda=0.03)
    x = inputs(rows=4)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = loss_of(model, x, how) + 0.03 * sum(p.abs().sum() for name, p in parameters.items() if name.endswith(".A"))
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    expected = {name: p - 0.5 * g for (name, p), g in zip(parameters.items(), gradients, strict=True)}
    optimizer = sgd(model)
    for part in x["input_ids"].chunk(batches):
        (loss_of(model, {"input_ids": part}, how) / batches).backward()
    optimizer.step()
    for name, p in parameters.items():
        torch.testing.assert_close(p, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("num_heads", "count"), [(None, 1), (5, 5), (12, 12)])
def test_the_choice(num_heads, count):
    """By the norms of `A` in all layers; then both vectors start from zero, and only the chosen `v` are trained."""
    model = lofit(num_heads=num_heads, selection_step=3, l1_lambda=0.0)
    plain = make()(**inputs()).logits
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for _ in range(2):
        step(model, optimizer)
    assert all(edit.selected.all() for edit in edits(model))
    before = copy.deepcopy(model)
    unhooked = copy.deepcopy(model)
    # the third update without what follows it: the same gradients on a copy that never gets there
    for edit in edits(unhooked):
        edit.selection_step = 100
    other = torch.optim.AdamW([p for p in unhooked.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(unhooked, other)
    norms = torch.stack([edit.A.norm(dim=1) for edit in edits(unhooked)]).flatten()
    expected = torch.zeros(12, dtype=torch.bool)
    expected[norms.argsort(descending=True)[:count]] = True

    step(model, optimizer)
    assert torch.equal(torch.cat([edit.selected for edit in edits(model)]), expected)
    assert all(not p.any() for edit in edits(model) for p in (edit.A, edit.v))
    assert torch.equal(model.eval()(**inputs()).logits, plain)
    assert all(edit.A.abs().sum() > 0 and edit.steps == 2 for edit in edits(before))  # a copy has a life of its own
    model.train()
    for _ in range(3):
        step(model, optimizer)
    for edit in edits(model):
        assert not edit.A.any()
        assert torch.equal(edit.v.abs().sum(1) > 0, edit.selected)


def test_the_second_stage_is_a_training_of_its_own():
    """The optimizer's moments are those of a fresh one: a second stage equals one from a fresh start."""
    model = lofit(num_heads=4, selection_step=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        step(model, optimizer)
    fresh = copy.deepcopy(model)
    again = torch.optim.AdamW([p for p in fresh.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        step(model, optimizer)
        step(fresh, again)
    for a, b in zip(edits(model), edits(fresh), strict=True):
        assert torch.equal(a.v, b.v)


def test_the_first_stage_trains_A_alone():
    """It chooses the heads that a training of `z' = (1 + A) z`, written plainly, chooses."""
    model = lofit(std=0.0, num_heads=5, selection_step=4, l1_lambda=0.01)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.0)
    plain = make()
    scales = [torch.zeros(4, 8, requires_grad=True) for _ in plain.model.layers]
    for layer, A in zip(plain.model.layers, scales, strict=True):
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args, A=A: (args[0] * (1 + A.flatten()),))
    other = torch.optim.AdamW(scales, lr=0.05, weight_decay=0.0)
    x = inputs(rows=4)
    for number in range(4):
        step(model, optimizer)
        assert not any(edit.v.any() for edit in edits(model)), number
        loss = plain(**x, labels=x["input_ids"]).loss + 0.01 * sum(A.abs().sum() for A in scales)
        loss.backward()
        other.step()
        other.zero_grad()
    norms = torch.cat([A.norm(dim=1) for A in scales])
    expected = set(norms.argsort(descending=True)[:5].tolist())
    assert set(torch.cat([edit.selected for edit in edits(model)]).nonzero().flatten().tolist()) == expected


def test_what_acts_is_counted(capsys):
    """All of `A` before the choice, the chosen heads' `v` after it: what is printed too."""
    model = lofit(num_heads=5, selection_step=1)
    assert acting_parameters(model) == model.get_nb_trainable_parameters()[0] == 3 * 4 * 8
    model.print_trainable_parameters()
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("trainable params: 96 || ")
    assert others == ["LoFiT: 40 remain after 1 optimizer steps, when 5 of 12 heads are chosen"]
    optimizer = sgd(model)
    step(model, optimizer)
    assert acting_parameters(model) == model.get_nb_trainable_parameters()[0] == 5 * 8
    model.print_trainable_parameters()
    assert [line.partition(" || ")[0] for line in capsys.readouterr().out.splitlines()] == ["trainable params: 40"]
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    step(model, optimizer)
    moved = sum(int((p != before[name]).sum()) for name, p in model.named_parameters() if name in before)
    assert moved == 5 * 8
    model.add_adapter("other", LofitConfig())
    assert acting_parameters(model) == 5 * 8
    assert acting_parameters(make()) == 0
    with torch.device("meta"):
        assert get_peft_model(make(), LofitConfig()).get_nb_trainable_parameters()[0] == 3 * 4 * 8


def test_equals_are_chosen_from_below():
    model = lofit(std=0.0, num_heads=6, selection_step=1)
    x = inputs()
    (0.0 * model(**x).logits.sum()).backward()
    sgd(model).step()
    assert [edit.selected.tolist() for edit in edits(model)] == [[True] * 4, [True, True, False, False], [False] * 4]


def test_diverged():
    model = lofit(selection_step=1)
    edits(model)[1].A.data[0, 0] = torch.nan
    model(**inputs(), labels=inputs()["input_ids"]).loss.backward()
    with pytest.raises(RuntimeError, match="`A` is not finite"):
        sgd(model).step()


def test_adapters_count_their_own_steps():
    model = lofit(selection_step=1, num_heads=1)
    model.add_adapter("other", LofitConfig(selection_step=2, num_heads=2))
    model.set_adapter("other")
    optimizer = sgd(model)
    step(model, optimizer)
    assert [int(edit.steps) for name in ("default", "other") for edit in edits(model, name)] == [0, 0, 0, 1, 1, 1]
    step(model, optimizer)
    assert sum(int(edit.selected.sum()) for edit in edits(model, "other")) == 2
    assert all(edit.selected.all() for edit in edits(model))


def test_float32_inside_half_precision():
    """`1 + A` keeps an `A` that bfloat16 would round away."""
    model = get_peft_model(make(dtype=torch.bfloat16), LofitConfig(), autocast_adapter_dtype=False)
    (edit, *_) = edits(model)
    edit.A.data.fill_(2.0**-10)
    z = torch.full((1, 32), 256.0 + 2, dtype=torch.bfloat16)
    assert torch.equal(edit(z, 8.0), (z.float() * (1 + 8 * 2.0**-10)).bfloat16())
    assert not torch.equal(edit(z, 8.0), z)


@pytest.mark.parametrize("flat", ["FSDP1", "DeepSpeed"])
def test_flattened_parameters_are_refused(flat):
    model = lofit()
    (edit, *_) = edits(model)
    if flat == "FSDP1":
        A = edit.A
        del edit._parameters["A"]
        edit.A = A.flatten()[:].view_as(A)
    else:
        edit.A.ds_id = 0
    with pytest.raises(RuntimeError, match="`A` cannot be changed between steps: FSDP1 and DeepSpeed"):
        model(**inputs())
    model.eval()(**inputs())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"site": "mlp"}, "`site='mlp'` contradicts `kind='lofit'`, which edits attention heads"),
        ({"num_heads": 0}, "`num_heads=0` must be an integer of at least 1"),
        ({"selection_step": 0}, "`selection_step=0` must be"),
        ({"selection_step": 1.5}, "`selection_step=1.5` must be"),
        ({"l1_lambda": -1}, "`l1_lambda=-1` must be a finite number of at least 0"),
        ({"rank_pattern": {"layers.1": 2}}, "`rank_pattern` contradicts `kind='lofit'`"),
        ({"activation": "silu"}, "`activation='silu'` contradicts `kind='lofit'`"),
        ({"kind": "vector", "num_heads": 3}, "`num_heads=3` contradicts `kind='vector'`: only kind='lofit' has it"),
    ],
)
def test_bad_settings(config, message):
    with pytest.raises(ValueError, match=message):
        LofitConfig(**config)


def test_more_heads_than_there_are():
    with pytest.raises(ValueError, match="`num_heads=13` cannot be chosen: the targeted blocks have 12 heads"):
        get_peft_model(make(), LofitConfig(num_heads=13))


def test_saving_before_the_choice_is_said(tmp_path, caplog):
    model = lofit(selection_step=2, num_heads=1)
    optimizer = sgd(model)
    step(model, optimizer)
    with caplog.at_level("WARNING", "peft_steer"):
        model.save_pretrained(tmp_path)
    assert "1 of `selection_step=2` optimizer steps are done" in caplog.text
    step(model, optimizer)
    caplog.clear()
    with caplog.at_level("WARNING", "peft_steer"):
        model.save_pretrained(tmp_path)
    assert caplog.text == ""


# --- under a trainer


@pytest.mark.multiprocess
@pytest.mark.slow
def test_several_processes(tmp_path):
    """Two processes with half a batch each choose the heads, and train the adapter, that one with the whole batch
    does, under DDP and FSDP2."""
    make_model = partial(lofit, selection_step=2, num_heads=5, l1_lambda=0.01)
    found = two_processes.run({"lofit": make_model}, tmp_path / "out.pt")
    model = make_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(two_processes.STEPS):
        step(model, optimizer)
    expected = get_peft_model_state_dict(model)
    assert sum(int(x.sum()) for name, x in expected.items() if name.endswith("selected")) == 5
    for kind in ("ddp", "fsdp2"):
        _, state = found["lofit", kind]
        assert state.keys() == expected.keys()
        for name, x in expected.items():
            torch.testing.assert_close(state[name], x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("selection_step", "checkpoint"), [(3, "checkpoint-2"), (4, "checkpoint-4")])
def test_sft_and_resume(tmp_path, tiny_llama, selection_step, checkpoint):
    """An interrupted run that is resumed, before the choice or at it, ends with the same adapter."""
    config = {"kind": "lofit", "selection_step": selection_step, "num_heads": 3}
    whole = sft(tiny_llama, tmp_path / "whole", **config)
    resumed = sft(tiny_llama, tmp_path / "resumed", str(tmp_path / "whole" / checkpoint), **config)
    expected = {k: x for k, x in whole.model.state_dict().items() if "steer_edit" in k}
    assert sum(int(x.sum()) for k, x in expected.items() if k.endswith("selected")) == 3
    assert {int(x) for k, x in expected.items() if k.endswith("steps")} == {6}
    assert all(torch.equal(x, expected[k]) for k, x in resumed.model.state_dict().items() if "steer_edit" in k)
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="float32"), tmp_path / "whole" / "checkpoint-6"
    )
    assert all(torch.equal(x, expected[k]) for k, x in loaded.state_dict().items() if "steer_edit" in k)
    assert all(p.any() for k, p in expected.items() if k.endswith(".v") and expected[k[:-1] + "selected"].any())
