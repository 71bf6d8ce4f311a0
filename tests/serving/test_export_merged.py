"""Merged models: loaded by transformers they give the adapter's logits, and a bias without a place is refused."""

import pytest
import torch
from tiny import adapted, inputs, make
from transformers import AutoModelForCausalLM

from peft_steer.serving.export import export_merged


def logits(model):
    with torch.no_grad():
        return model(**inputs()).logits


@pytest.mark.parametrize(
    ("config", "flags"),
    [
        ({"kind": "linear", "site": ["mlp", "attention"]}, {}),
        ({"kind": "loreft", "site": "mlp"}, {"mlp_bias": True}),
        ({"kind": "loreft", "site": "attention"}, {"attention_bias": True}),
        ({"kind": "noreft", "site": ["mlp", "heads"]}, {"mlp_bias": True, "attention_bias": True}),
        ({"kind": "vector", "site": "block"}, {"mlp_bias": True}),
        ({"kind": "jola", "site": "heads"}, {"attention_bias": True}),
    ],
)
def test_loaded_by_transformers(config, flags, tmp_path):
    model = adapted(**config)
    expected = logits(model)
    export_merged(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=0)
    assert (expected - logits(make())).abs().max() > 0.01  # the control
    assert {flag: True for flag in ("mlp_bias", "attention_bias") if getattr(loaded.config, flag)} == flags


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("qwen3", {"kind": "loreft", "site": "mlp"}, "no place for it.*--constants bias"),
        ("llama", {"kind": "linear", "site": "block"}, "skip connection.*vLLM"),
        ("llama", {"kind": "nonlinear", "site": "mlp"}, "nonlinear edit.*vLLM"),
        ("llama", {"kind": "linear", "site": "mlp", "positions": "last"}, "positions='last'"),
    ],
)
def test_refused(architecture, config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_merged(adapted(architecture, **config), tmp_path / "out")
    assert not (tmp_path / "out").exists()
