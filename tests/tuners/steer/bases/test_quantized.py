"""Quantized and half-precision bases: real training on the CPU, files, and bitsandbytes' lost gradients."""

import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu, dequantize_4bit, has_avx512bf16
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from tiny import BASES, HEAD_KINDS, KINDS, METHODS, inputs, logits, make, randomize
from training import train
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_steer import SteerConfig
from peft_steer.utils.bitsandbytes import keep_unpacked


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """64 wide: bitsandbytes' block size."""
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(**{**make().config.to_dict(), "hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def load(checkpoint, base):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **BASES[base]).eval()
    keep_unpacked(model)  # so that the base computes the same before an adapter is added, on any CPU
    return model


@pytest.mark.parametrize(
    ("method", "kind", "site"),
    [
        (method, kind, site)
        for kind, site in [
            ("vector", "attention"),
            ("linear_bias", "mlp"),
            ("silu", "block"),
            ("loreft", "attention"),
            ("lofit", "heads"),
            ("jola", "heads"),
        ]
        for method in METHODS
        if (method, site) != ("joint", "heads")
    ],
)
@pytest.mark.parametrize("base", BASES)
def test_train_save_load(method, tmp_path, checkpoint, base, kind, site):
    model = load(checkpoint, base)
    plain = logits(model)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    model = get_peft_model(
        model, METHODS[method](task_type="CAUSAL_LM", **{"r": 4, "site": site, **(KINDS | HEAD_KINDS)[kind]})
    )
    assert torch.equal(logits(model), plain)
    losses = train(model)
    assert losses[-1] < losses[0] - 0.01
    assert all(torch.isfinite(torch.tensor(losses)))
    after = {name.replace(".base_layer", ""): p for name, p in model.get_base_model().named_parameters()}
    assert all(torch.equal(after[name], p) for name, p in frozen.items())
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(checkpoint, base), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("trained", "loaded"), [("fp32", "nf4"), ("fp32", "int8"), ("nf4", "bf16"), ("nf4", "fp32")])
def test_an_adapter_moves_to_another_precision(method, tmp_path, checkpoint, trained, loaded):
    """It does there what it did, as far as the bases agree."""
    model = get_peft_model(load(checkpoint, trained), METHODS[method](kind="nonlinear", task_type="CAUSAL_LM")).eval()
    randomize(model, std=0.5)
    model.save_pretrained(tmp_path)
    other = load(checkpoint, loaded)
    plain = logits(other)
    error = (plain - logits(load(checkpoint, trained))).norm()
    steered = PeftModel.from_pretrained(other, tmp_path)
    assert (logits(steered) - logits(model)).norm() < 3 * error < (logits(steered) - plain).norm()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_kbit_preparation_and_checkpointing(method, checkpoint, base):
    model = prepare_model_for_kbit_training(
        load(checkpoint, base), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model = get_peft_model(model, METHODS[method](kind="nonlinear", task_type="CAUSAL_LM"))
    losses = train(model)
    assert losses[-1] < losses[0] - 0.01


@pytest.mark.parametrize("base", ["nf4", "nf4_double", "int8"])
def test_merging_into_quantized_weights_is_refused(checkpoint, base):
    model = get_peft_model(load(checkpoint, base), SteerConfig(site="mlp", kind="linear", task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="is quantized"):
        model.merge_and_unload()


@pytest.mark.parametrize("evaluate", ["before wrapping", "after wrapping"])
@pytest.mark.parametrize("base", ["nf4", "nf4_double"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_after_an_evaluation(method, checkpoint, base, evaluate):
    """bitsandbytes on CPUs with AVX512-BF16 packs 4-bit weights in the first evaluation and loses gradients from then
    on."""

    def gradients(evaluated):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, **BASES[base]).eval()
        if evaluated and evaluate == "before wrapping":
            logits(model)
        model = get_peft_model(model, METHODS[method](kind="nonlinear", task_type="CAUSAL_LM"))
        randomize(model, std=0.1)
        if evaluated and evaluate == "after wrapping":
            logits(model.eval())
        x = inputs()
        model.train()(**x, labels=x["input_ids"]).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    expected, found = gradients(False), gradients(True)
    assert all(g.abs().sum() > 0 for g in expected.values())
    # Packing has rounded the scales of the weights to bfloat16, and quantized them anew if they were quantized.
    error = 0.05 if evaluate == "before wrapping" and has_avx512bf16() else 0
    for name, g in expected.items():
        assert (found[name] - g).norm() <= error * g.norm(), name


@pytest.mark.parametrize("base", ["nf4", "nf4_double"])
def test_packed_4bit_weights_are_unpacked(checkpoint, base, caplog):
    """The same on any CPU: the layers say that they would pack, and are packed as by an evaluation."""
    model = load(checkpoint, base)
    layers = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    weights = [dequantize_4bit(m.weight.data, m.weight.quant_state).clone() for m in layers]
    for m in layers:
        m.support_avx512bf16_for_cpu = True
        m.weight.data, m.weight.quant_state = _convert_weight_packed_for_cpu(m.weight.data, m.weight.quant_state)
    get_peft_model(model, SteerConfig(task_type="CAUSAL_LM"))
    assert "Load it again for the exact weights" in caplog.text
    for m, expected in zip(layers, weights, strict=True):
        assert not m.support_avx512bf16_for_cpu
        found = dequantize_4bit(m.weight.data, m.weight.quant_state)
        assert (found - expected).norm() < 4e-3 * expected.norm()  # the scales are bfloat16 now
