"""Putting an adapter on a base never changes the base's embeddings, which may be padded beyond the tokenizer."""

import pytest
import torch
import transformers as tf
from peft import LoraConfig
from saved import save_adapter

from peft_steer import SteerConfig
from peft_steer.evaluation.lm import PeftSteerLM


def resized(tiny_llama, folder, tokens: int) -> str:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.resize_token_embeddings(tokens)
    model.save_pretrained(folder)
    tf.AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("config", [SteerConfig(kind="linear"), LoraConfig(target_modules="all-linear")], ids=type)
def test_padded_embeddings_stay(tiny_llama, tmp_path, config):
    tokens = len(tf.AutoTokenizer.from_pretrained(tiny_llama))
    base = resized(tiny_llama, tmp_path / "base", tokens + 23)
    adapter = save_adapter(base, config, tmp_path / "adapter")
    lm = PeftSteerLM(pretrained=base, device="cpu")
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        before = lm.model(ids).logits
    lm.load_adapter(adapter)
    with torch.no_grad():
        assert not torch.allclose(lm.model(ids).logits, before)
    lm.load_adapter(None)
    with torch.no_grad():
        assert torch.equal(lm.model(ids).logits, before)
    assert before.shape[-1] == tokens + 23


def test_too_few_embeddings_are_an_error(tiny_llama, tmp_path):
    tokens = len(tf.AutoTokenizer.from_pretrained(tiny_llama))
    base = resized(tiny_llama, tmp_path / "base", tokens - 2)
    lm = PeftSteerLM(pretrained=base, device="cpu")
    with pytest.raises(ValueError, match=rf"the tokenizer has {tokens} tokens and the base {tokens - 2} embeddings"):
        lm.load_adapter(save_adapter(base, SteerConfig(), tmp_path / "adapter"))
