"""One adapter for every request of an engine, against transformers."""

import json
import shutil

import pytest
import torch
from engines import difference, load, prompts, run_engine, save_adapter, save_model
from tiny import KINDS, reference_delta


REQUESTS = [[prompt, None] for prompt in prompts()]
CASES = {
    "compiled_loreft": ("qwen3", {"kind": "loreft", "site": ["block", "mlp"]}, 1.0),
    "vector": ("llama", {"kind": "vector"}, 1.0),
    "mixed_units": ("llama", {"kind": "noreft", "activation": "tanh", "site": "attention"}, 0.7),
    "qwen3_moe": ("qwen3_moe", {"kind": "loreft", "site": ["block", "mlp", "attention"]}, 1.0),
    "mixtral": ("mixtral", {"kind": "loreft", "site": ["block", "mlp", "attention"]}, 1.0),
    "some_blocks": ("gemma3", {"kind": "linear", "use_bias": True, "site": "mlp", "layers_to_transform": [1]}, -1.5),
}


@pytest.mark.parametrize("case", CASES)
def test_log_probabilities(tmp_path, case):
    architecture, config, scale = CASES[case]
    base = save_model(tmp_path / "base", architecture)
    adapter = save_adapter(base, tmp_path / "adapter", scale=0.8, **config)
    found = run_engine(
        tmp_path,
        base,
        [REQUESTS],
        additional_config={"peft_steer": {"adapter": adapter, "scale": scale}},
        enforce_eager=not case.startswith("compiled"),
    )
    assert found["error"] is None, found["log"]
    assert difference(load(base, adapter, scale), REQUESTS, found["rounds"][0]) < 1e-4
    assert difference(load(base), REQUESTS, found["rounds"][0]) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_of_every_kind(kind):
    """Written as an engine writes it, against the equation in float64."""
    from peft_steer import SteerConfig
    from peft_steer.interventions import KINDS as CLASSES
    from peft_steer.serving.vllm.layers import Edit

    torch.manual_seed(0)
    config = SteerConfig(r=3, init_weights=False, **KINDS[kind])
    made = CLASSES[config.kind].build(config, 16, 3)
    form = made.low_rank(0.7)
    edit = Edit(16, form)
    h = torch.randn(5, 16)
    assert not edit(h).any()
    for name, x in form.tensors().items():
        edit.write(name, x)
    torch.testing.assert_close(edit(h).double(), 0.7 * reference_delta(made, h), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"The edit has \w of shape"):
        edit.write("A" if form.A.numel() else "v", torch.zeros(2, 3))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("base"))


def refused(base: str, asked: object, **engine: object) -> str:
    """The error of an engine that is asked for this; nothing is loaded."""
    from vllm import EngineArgs

    arguments = EngineArgs(
        model=base, skip_tokenizer_init=True, max_model_len=64, additional_config={"peft_steer": asked}, **engine
    )
    with pytest.raises(ValueError, match=r"peft.steer") as error:
        arguments.create_engine_config()
    return str(error.value)


def test_options(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "a")
    assert "must be" in refused(base, "x")
    assert "unknown ['adaptor']" in refused(base, {"adaptor": adapter})
    assert "exactly one of" in refused(base, {})
    assert "exactly one of" in refused(base, {"adapter": adapter, "sites": ["block"]})
    assert "['sites']=['head']" in refused(base, {"sites": ["head"]}, enable_lora=True)
    assert "enable_lora=True" in refused(base, {"sites": ["block"]})
    assert "peft-steer: add 'steering'" in refused(
        base, {"sites": ["block"]}, enable_lora=True, lora_target_modules=["q_proj"]
    )
    assert "['scale']='big'" in refused(base, {"adapter": adapter, "scale": "big"})
    assert "there is no file" in refused(base, {"adapter": str(tmp_path / "nowhere")})
    assert "tensor_parallel_size=2: peft-steer" in refused(base, {"adapter": adapter}, tensor_parallel_size=2)


def test_a_version_that_was_not_tried_warns_once(base, tmp_path, monkeypatch, caplog):
    from vllm import EngineArgs

    from peft_steer.serving.vllm import options as ours

    monkeypatch.setattr(ours, "TRIED", ("0.1",))
    asked = {"peft_steer": {"adapter": save_adapter(base, tmp_path / "a")}}
    EngineArgs(model=base, skip_tokenizer_init=True, max_model_len=64, additional_config=asked).create_engine_config()
    assert sum("was tried with vLLM 0.1, this is" in record.message for record in caplog.records) == 1


def test_an_architecture_that_is_not_in_the_table_is_refused(tmp_path):
    import transformers as tf

    tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=64, n_head=2, n_layer=2, vocab_size=99)).save_pretrained(tmp_path)
    message = refused(str(tmp_path), {"sites": ["block"]}, enable_lora=True)
    assert "cannot steer GPT2LMHeadModel in vLLM, only" in message


def test_adapters_that_cannot_be_served(base, tmp_path):
    from peft_steer.serving.vllm.adapters import read

    cases = {
        "site='heads'": {"site": "heads", "kind": "vector"},
        "modules_to_save": {"modules_to_save": ["lm_head"]},
        "share_weights=False": {"positions": "f1+l1", "share_weights": False},
        "steer_positions='prompt'": {"method": "joint", "kind": "linear", "positions": "prompt"},
    }
    for i, (message, config) in enumerate(cases.items()):
        adapter = save_adapter(base, tmp_path / str(i), **config)
        with pytest.raises(ValueError, match=message):
            read(adapter)
    with pytest.raises(ValueError, match="a model with hidden_size=64; this one has 32"):
        read(save_adapter(base, tmp_path / "good")).check_fits("it", 32, 3)
    adapter = save_adapter(base, tmp_path / "dora", method="joint", kind="linear")
    file = tmp_path / "dora" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_dora": True}))
    with pytest.raises(ValueError, match="use_dora: vLLM does not run DoRA"):
        read(adapter)


def test_an_engine_that_was_not_asked_is_vllms_own(base, tmp_path):
    """The plugin changes no number, and imports neither PEFT nor this package."""
    found = run_engine(tmp_path, base, [REQUESTS])
    assert found["error"] is None, found["log"]
    assert difference(load(base), REQUESTS, found["rounds"][0]) < 1e-4
    assert not {"peft", "peft_steer"} & set(found["modules"])
    assert "peft_steer_vllm" in found["modules"]


def test_another_models_adapter_is_refused(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    shutil.copy(file, tmp_path / "kept.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_blocks": 4}))
    found = run_engine(tmp_path, base, [REQUESTS], additional_config={"peft_steer": {"adapter": adapter}})
    assert "was made for a model with num_blocks=4; this one has 3" in found["error"]
