"""Bases quantized by other libraries than bitsandbytes. The code knows none of them; each test needs its package.
(transformers 5.23 loads no HQQ; GPTQ and AWQ have no wheels for CPUs.)"""

from importlib.util import find_spec

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import METHODS, SMALL, logits
from training import train
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, QuantoConfig, TorchAoConfig


def torchao():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


BACKENDS = {
    "torchao": torchao,
    "optimum.quanto": lambda: QuantoConfig(weights="int8"),
}


def installed(package: str) -> bool:
    return find_spec(package.partition(".")[0]) is not None and find_spec(package) is not None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_train_save_load(tmp_path, backend, method):
    if not installed(backend):
        pytest.skip(f"{backend} is not installed")
    torch.manual_seed(0)
    wide = LlamaConfig(**{**SMALL, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
    LlamaForCausalLM(wide).save_pretrained(tmp_path / "base")

    def base():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", dtype=torch.float32, quantization_config=BACKENDS[backend]()
        ).eval()

    model = base()
    plain = logits(model)
    model = get_peft_model(model, METHODS[method](kind="nonlinear", r=4, task_type="CAUSAL_LM"))
    assert torch.equal(logits(model), plain)
    losses = train(model)
    assert losses[-1] < losses[0] - 0.01
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model.eval()))
