"""`peft-steer export` from the command line: what it writes, compares and refuses."""

import pytest
import torch
from command_line import peft_steer
from peft import PeftModel, get_peft_model
from tiny import randomize
from transformers import AutoModelForCausalLM

from peft_steer import SteerConfig


@pytest.fixture
def adapter(tiny_llama, tmp_path):
    """Makes the folder of a random adapter of `tiny_llama`."""

    def make(**config):
        base = AutoModelForCausalLM.from_pretrained(tiny_llama)
        model = get_peft_model(base, SteerConfig(task_type="CAUSAL_LM", **config))
        randomize(model, std=0.3)
        model.save_pretrained(tmp_path / "adapter")
        return str(tmp_path / "adapter")

    return make


def log_probs(model):
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.log_softmax(-1)


@pytest.mark.parametrize("form", ["lora", "merged"])
def test_written_and_compared(form, adapter, tiny_llama, tmp_path, capsys):
    folder = adapter(kind="linear", site="mlp", r=4)
    assert peft_steer("export", folder, "--format", form, "-o", tmp_path / "out", "--scale", "0.5") == 0
    assert "differ from the adapter's by" in capsys.readouterr().out
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    expected = PeftModel.from_pretrained(base, folder)
    expected.base_model.set_scale("default", 0.5)
    steered = log_probs(expected)
    unsteered = log_probs(expected.unload())
    if form == "lora":
        written = PeftModel.from_pretrained(base, tmp_path / "out")
    else:
        written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert (tmp_path / "out" / "tokenizer.json").is_file()
    torch.testing.assert_close(log_probs(written), steered, atol=1e-4, rtol=0)
    assert (unsteered - steered).abs().max() > 0.1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_vector_prints_how_to_serve_it(adapter, tmp_path, capsys):
    folder = adapter(kind="vector", layers_to_transform=[1])
    assert peft_steer("export", folder, "--format", "gguf-vector", "-o", tmp_path / "v.gguf") == 0
    out = capsys.readouterr().out
    assert f"--control-vector-scaled {tmp_path / 'v.gguf'}:1.0" in out
    assert "Control vector of block 1, norm" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "merged", "--constants", "bias"], "--constants is for --format lora, not merged"),
        (["--format", "lora", "--architecture", "llama"], "--architecture is for --format gguf-vector, not lora"),
        (["--format", "lora", "--drop-block-0"], "--drop-block-0 needs --constants vector"),
        (["--format", "gguf-vector"], "kind='linear'"),
        (["--format", "lora", "--base", "no/such-model"], "--base: 'no/such-model' cannot be loaded"),
    ],
)
def test_refused(flags, message, adapter, tmp_path, capsys):
    folder = adapter(kind="linear", site="mlp", r=4)
    assert peft_steer("export", folder, *flags, "-o", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("form", "config", "message"),
    [
        ("gguf-vector", {"kind": "vector", "positions": "last"}, "positions='last'"),
        ("lora", {"kind": "linear", "site": "mlp", "positions": "last"}, "positions='last'"),
        ("merged", {"kind": "linear", "site": "mlp", "positions": "f1+l1"}, "positions='f1+l1'"),
        ("lora", {"kind": "linear"}, "site='block', kind='linear'"),
        ("lora", {"kind": "nonlinear", "site": "mlp"}, "activation='silu'"),
    ],
)
def test_refused_before_the_base_is_loaded(form, config, message, adapter, tmp_path, capsys, monkeypatch):
    folder = adapter(**config)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    assert peft_steer("export", folder, "--format", form, "-o", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_lora_and_control_vector_are_compared_together(adapter, tmp_path, capsys, monkeypatch):
    """Together they are the adapter; a vector at another block is noticed, and nothing is kept."""
    folder = adapter(kind="loreft", site="mlp", r=4, layers_to_transform=[1])
    flags = [folder, "--format", "lora", "--constants", "vector"]
    assert peft_steer("export", *flags, "-o", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert f"llama-server -m MODEL.gguf --lora lora.gguf --control-vector-scaled {tmp_path / 'out'}" in out

    from peft_steer.serving.export import command

    read = command.read_control_vector
    monkeypatch.setattr(command, "read_control_vector", lambda file: {0: read(file)[1]})
    with pytest.raises(ValueError, match="is not the adapter"):
        peft_steer("export", *flags, "-o", tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_nothing_is_overwritten(adapter, tmp_path, capsys):
    folder = adapter(kind="linear", site="mlp", r=4)
    assert peft_steer("export", folder, "--format", "lora", "-o", folder) == 2
    assert "exists; name another" in capsys.readouterr().err


def test_a_wrong_file_is_not_kept(adapter, tmp_path, monkeypatch):
    from peft_steer.serving.export import lora

    pair_of = lora.pair_of
    monkeypatch.setattr(lora, "pair_of", lambda edit, linear: pair_of(edit, linear)._replace(c=torch.zeros(32)))
    folder = adapter(kind="loreft", site="mlp", r=4)
    with pytest.raises(ValueError, match="is not the adapter"):  # a fault of ours, with its traceback
        peft_steer("export", folder, "--format", "lora", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()
