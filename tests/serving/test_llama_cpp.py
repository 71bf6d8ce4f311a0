"""What is exported, in llama.cpp itself where `llama-server` is found: it gives the adapter's log-probabilities."""

import pytest
import torch
from llama_cpp import SERVER, next_log_probs, served, write_lora, write_model
from peft import get_peft_model
from tiny import randomize
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_steer import SteerConfig
from peft_steer.serving.export import export_gguf_vector, export_lora


pytestmark = pytest.mark.skipif(SERVER is None, reason="needs llama.cpp's llama-server on the PATH")
IDS = list(range(3, 40))


@pytest.fixture(scope="module")
def base(tiny_llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("llama_cpp") / "base.gguf"
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    write_model(model, tokenizer.convert_ids_to_tokens(range(model.config.vocab_size)), path)
    return path


def adapter(tiny_llama, **config):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama), SteerConfig(task_type="CAUSAL_LM", **config)
    )
    randomize(model, std=0.3)
    return model.eval()


@torch.no_grad()
def expected(model):
    return model(input_ids=torch.tensor([IDS])).logits[0, -1].log_softmax(-1)


def in_llama_cpp(base, size, *flags):
    with served(base, *flags) as address:
        return next_log_probs(address, IDS, size)


def check(found, model):
    torch.testing.assert_close(found, expected(model), atol=1e-3, rtol=0)
    with model.disable_adapter():
        assert (found - expected(model)).abs().max() > 0.1  # the control: the base would be far off


def test_the_base_and_a_control_vector(base, tiny_llama, tmp_path):
    model = adapter(tiny_llama, kind="vector", layers_to_transform=[1])
    export_gguf_vector(model, tmp_path / "v.gguf")
    size = model.config.vocab_size
    check(in_llama_cpp(base, size, "--control-vector-scaled", f"{tmp_path / 'v.gguf'}:1.0"), model)
    unsteered = in_llama_cpp(base, size)
    model.base_model.set_scale("default", -0.5)
    check(in_llama_cpp(base, size, "--control-vector-scaled", f"{tmp_path / 'v.gguf'}:-0.5"), model)
    with model.disable_adapter():
        torch.testing.assert_close(unsteered, expected(model), atol=1e-3, rtol=0)


def test_lora(base, tiny_llama, tmp_path):
    model = adapter(tiny_llama, kind="linear", site=["mlp", "attention"], r=4)
    export_lora(model, tmp_path / "lora")
    write_lora(tmp_path / "lora", tmp_path / "lora.gguf")
    check(in_llama_cpp(base, model.config.vocab_size, "--lora", str(tmp_path / "lora.gguf")), model)


def test_lora_with_a_control_vector(base, tiny_llama, tmp_path):
    model = adapter(tiny_llama, kind="loreft", site="mlp", r=4, layers_to_transform=[1])
    export_lora(model, tmp_path / "lora", constants="vector")
    write_lora(tmp_path / "lora", tmp_path / "lora.gguf")
    vector = f"{tmp_path / 'lora' / 'control_vector.gguf'}:1.0"
    flags = ["--lora", str(tmp_path / "lora.gguf")]
    size = model.config.vocab_size
    check(in_llama_cpp(base, size, *flags, "--control-vector-scaled", vector), model)
    assert (in_llama_cpp(base, size, *flags) - expected(model)).abs().max() > 0.01  # the vector is needed
