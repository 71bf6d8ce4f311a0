"""`peft-steer analyze first-order`: derivatives against plain equations and finite differences, and the command."""

import json

import pandas as pd
import pytest
import tiny
import torch
import torch.nn.functional as F
from analysis_models import analyze, pair_of, random_texts, with_adapter
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peft_steer import SteerConfig
from peft_steer.analysis.first_order import inputs, measure, summary
from peft_steer.analysis.inputs.pairs import blocks_of
from peft_steer.analysis.maths.first_order_theory import Update, match
from peft_steer.analysis.maths.mlp import find_mlp, plain_copy
from peft_steer.utils.bitsandbytes import keep_unpacked


# every one with a GLU or a plain MLP; the feed-forward layers of OPT and BERT are no module of their own
WITH_MLP = [name for name in tiny.ARCHITECTURES if name not in ("mixtral", "qwen3_moe", "t5")]


def blocks(architecture: str = "llama", std: float = 0.3, **lora):
    config = LoraConfig(r=4, target_modules="all-linear", **lora)
    return blocks_of(tiny.make(architecture))[1], blocks_of(with_adapter(tiny.make(architecture), config, std))[1]


def update(*args, **lora) -> Update:
    return Update.between(*map(find_mlp, blocks(*args, **lora)))


def state(seed: int = 0) -> torch.Tensor:
    return torch.randn(tiny.D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("architecture", WITH_MLP)
def test_every_mlp_is_the_function_that_the_block_computes(architecture):
    for block in blocks(architecture):
        mlp, h = find_mlp(block), torch.randn(1, 1, tiny.D)
        seen = []
        last = block.module.get_submodule("fc2") if architecture == "opt" else mlp.module.get_submodule(mlp.output)
        handle = last.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
        mlp.module(h, *([torch.zeros_like(h)] if mlp.takes_residual else []))
        handle.remove()
        extra = [torch.zeros_like(h).double()] if mlp.takes_residual else []
        torch.testing.assert_close(plain_copy(mlp.module)(h.double(), *extra).float(), seen[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", [name for name in WITH_MLP if name != "bloom"])
def test_derivatives_are_finite_differences(architecture):
    change, h, step = update(architecture), state(), 1e-5
    assert change.finite_difference_error(h) < 1e-6
    A, direction = change.jacobian(h), state(1)
    difference = (change(h + step * direction) - change(h - step * direction)) / (2 * step)
    torch.testing.assert_close(A @ direction, difference, rtol=1e-6, atol=1e-9)


def test_the_update_of_a_glu_is_the_equation():
    base, tuned = blocks()
    change, h = Update.between(find_mlp(base), find_mlp(tuned)), state()
    names = ("gate_proj", "up_proj", "down_proj")
    W_g, W_u, W_d = (base.module.mlp.get_submodule(name).weight.double() for name in names)
    adapted = [tuned.module.mlp.get_submodule(name) for name in names]
    dW_g, dW_u, dW_d = (
        layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double() * layer.scaling["default"]
        for layer in adapted
    )
    g, u, s = W_g @ h, W_u @ h, torch.sigmoid(W_g @ h)
    slope, m = s + g * s * (1 - s), F.silu(g) * u
    down = dW_d @ m
    inner = W_d @ (slope * (dW_g @ h) * u + F.silu(g) * (dW_u @ h))
    torch.testing.assert_close(change(h), W_d @ m)
    torch.testing.assert_close(change.directional(h, change.output), down, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(change.directional(h, tuple(change.weights)), down + inner, rtol=1e-5, atol=1e-9)
    A = W_d @ (torch.diag(slope * u) @ W_g + torch.diag(F.silu(g)) @ W_u)
    torch.testing.assert_close(change.jacobian(h), A)

    found = match(change, h)
    shift = (W_d + dW_d) @ (F.silu((W_g + dW_g) @ h) * ((W_u + dW_u) @ h)) - W_d @ m
    assert found["remainder"] == pytest.approx(((shift - down - inner).norm() / shift.norm()).item(), rel=1e-4)
    assert found["shift"] == pytest.approx((shift.norm() / (W_d @ m).norm()).item(), rel=1e-5)
    assert found["down_share"] == pytest.approx((down.norm() / (down + inner).norm()).item(), rel=1e-5)
    for space in found["spaces"]:
        pinv = torch.linalg.pinv(A, rtol=space["tolerance"] or 1e-13)
        dh = pinv @ (down + inner)
        for name, x in (("outside_down", down), ("outside_inner", inner), ("outside", down + inner)):
            assert space[name] == pytest.approx(((x - A @ pinv @ x).norm() / x.norm()).item(), abs=1e-5)
        assert space["size"] == pytest.approx((dh.norm() / h.norm()).item(), rel=1e-4)
        reached = ((change(h + dh) - change(h) - shift).norm() / shift.norm()).item()
        assert space["reached"] == pytest.approx(reached, rel=1e-3)


def test_a_narrow_mlp_cannot_follow_a_change_of_its_last_layer():
    config = {**tiny.SMALL, "intermediate_size": 8}
    torch.manual_seed(0)
    base, other = (tiny.tf.LlamaForCausalLM(tiny.tf.LlamaConfig(**config)) for _ in range(2))
    base.model.layers[1].mlp.down_proj.weight.data[:, 0] *= 1e-9  # is still a direction
    other.load_state_dict(base.state_dict())
    other.model.layers[1].mlp.down_proj.weight.data += 0.1 * torch.randn(tiny.D, 8)
    change, h = Update.between(*(find_mlp(blocks_of(model)[1]) for model in (base, other))), state()
    space = match(change, h)["spaces"][-1]
    columns = base.model.layers[1].mlp.down_proj.weight.detach().double()  # A(h) has no others
    target = change.directional(h, change.output)
    residual = target - columns @ torch.linalg.lstsq(columns, target[:, None]).solution[:, 0]
    assert space["rank"] == 8
    assert space["outside"] == pytest.approx((residual.norm() / target.norm()).item(), rel=1e-6)
    assert space["outside"] > 0.5


def test_the_table_is_of_medians_over_tokens():
    change, h = update(), torch.stack([state(seed) for seed in range(3)])
    rows, tokens = measure(change, h, block=7), [match(change, each) for each in h]
    for k, row in enumerate(rows):
        assert row["shift"] == sorted(token["shift"] for token in tokens)[1]
        assert row["reached"] == sorted(token["spaces"][k]["reached"] for token in tokens)[1]
        assert row["finite_difference"] == max(token["finite_difference"] for token in tokens)
    (best,) = summary(pd.DataFrame(rows)).to_dict("records")
    assert best["reached"] == min(row["reached"] for row in rows)
    assert best["reached_exact"] == rows[-1]["reached"]


def test_small_updates_are_matched_before_the_mlp():
    space = match(update("llama", 1e-4), state())["spaces"][-1]
    assert space["rank"] == tiny.D
    assert space["outside"] < 1e-9
    assert space["reached"] < 1e-2  # what is left is of second order
    assert match(update("llama", 0.3), state())["spaces"][-1]["reached"] > 10 * space["reached"]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights_are_dequantized(bits, tmp_path):
    config = {**tiny.SMALL, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    tiny.tf.LlamaForCausalLM(tiny.tf.LlamaConfig(**config)).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization)
    keep_unpacked(model)
    model = with_adapter(model)
    mlp, h = find_mlp(blocks_of(model)[0]), torch.randn(3, 64)
    with torch.no_grad():
        expected = mlp.module(h)
    error = (plain_copy(mlp.module)(h.double()) - expected).norm() / expected.norm()
    assert error < (1e-3 if bits == 4 else 3e-2)  # int8 rounds the activations too


@pytest.mark.parametrize("state", ["biased", "disabled", "merged"])
def test_what_an_adapter_does_is_in_the_copy(state):
    config = LoraConfig(r=4, target_modules="all-linear", lora_bias=state == "biased")
    model = with_adapter(tiny.make("gpt2" if state == "biased" else "llama"), config)
    if state == "disabled":
        model.base_model.disable_adapter_layers()
    if state == "merged":
        model.merge_adapter()
    mlp, h = find_mlp(blocks_of(model)[1]).module, torch.randn(3, tiny.D)
    torch.testing.assert_close(plain_copy(mlp)(h.double()).float(), mlp(h), atol=1e-5, rtol=1e-4)


def test_the_inputs_are_those_of_the_mlps():
    model, texts = tiny.make(), random_texts(4, batch_size=2)
    found = inputs(model, texts, 4, seed=0)
    assert [x.shape for x in found] == [(4, tiny.D)] * 3
    seen = []
    handle = model.model.layers[2].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    for ids, _ in texts.rows:
        model(torch.tensor([ids]))
    handle.remove()
    distances = [(states.double() - x).norm(dim=-1) for x, states in zip(found[2], seen, strict=True)]
    assert all(distance.min() < 1e-5 for distance in distances)
    assert len({int(distance.argmin()) for distance in distances}) > 1  # not always the same place


@pytest.mark.parametrize(
    ("architecture", "adapter", "message"),
    [
        ("mixtral", "lora", "mixture of experts"),
        ("llama", SteerConfig(r=2, site="mlp"), "steered"),
        ("llama", LoraConfig(target_modules="all-linear", use_dora=True), "DoRA"),
        ("llama", LoraConfig(target_modules="all-linear", lora_bias=True), "a bias .* they do not have in the base"),
    ],
)
def test_refused(architecture, adapter, message):
    pair = pair_of(architecture, adapter)
    with pytest.raises(ValueError, match=message):
        Update.between(*(find_mlp(blocks_of(model)[0]) for model in (pair.base, pair.tuned)))


def test_an_activation_without_a_forward_derivative_is_refused():
    with pytest.raises(ValueError, match="BloomMLP computes its activation by its own autograd function"):
        match(update("bloom"), state())


def test_command_goes_on_where_it_stopped(tiny_llama, tmp_path, capsys):
    words = ("first-order", "--tokens", "3")
    assert analyze(tmp_path, tiny_llama, *words, "--layers_to_transform", "1") == 0
    file = tmp_path / "out" / "first_order.json"
    found = json.loads(file.read_text())
    found["rows"][0]["rank"] = 12345  # would be another if the block were measured again
    file.write_text(json.dumps(found))
    assert analyze(tmp_path, tiny_llama, *words) == 0
    table = pd.read_csv(file.with_suffix(".csv"))
    assert table["block"].tolist() == [0] * 4 + [1] * 4
    assert table["rank"].iloc[4] == 12345
    assert table["finite_difference"].max() < 1e-6
    assert analyze(tmp_path, tiny_llama, "first-order", "--tokens", "4") == 2
    assert "first_order.json is from a run with tokens 3 instead of 4" in capsys.readouterr().err


def test_command_refuses_what_it_cannot_measure(tiny_llama, tmp_path, capsys):
    for words, message in (
        (("--tokens", "99"), "--tokens is 99, but there are 16 texts"),
        (("--layers_to_transform", "2"), "the blocks are 0 to 1"),
    ):
        assert analyze(tmp_path, tiny_llama, "first-order", *words) == 2
        assert message in capsys.readouterr().err
    assert analyze(tmp_path, tiny_llama, "first-order", adapter=SteerConfig(r=2)) == 2
    assert "no weight of an MLP differs" in capsys.readouterr().err
