"""What the page asks of the model: base and steered texts, strengths, blocks, divergence, and code that repeats it."""

import pytest
import torch
from command_line import peft_steer
from peft import PeftModel, get_peft_model
from tiny import joint_config, randomize
from transformers import AutoModelForCausalLM

from peft_steer import SteerConfig
from peft_steer.play.page import respond
from peft_steer.play.render import as_code
from peft_steer.play.session import Sampling, Settings, load, parse_blocks


CONFIGS = {
    "vector": lambda: SteerConfig(kind="vector", task_type="CAUSAL_LM"),
    "post_block": lambda: SteerConfig(kind="nonlinear", r=4, task_type="CAUSAL_LM"),
    "positions": lambda: SteerConfig(kind="loreft", r=4, positions="f2+l2", task_type="CAUSAL_LM"),
    "joint": lambda: joint_config(kind="linear", r=4, task_type="CAUSAL_LM"),
}


@pytest.fixture
def folder(tiny_llama, tmp_path):
    def save(name, seed=1):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), CONFIGS[name]())
        randomize(model, std=0.5, seed=seed)
        path = str(tmp_path / f"{name}{seed}")
        model.save_pretrained(path)
        return path

    return save


def session_of(tiny_llama, adapters, bits=None):
    return load(tiny_llama, tiny_llama, adapters, "float32", bits)


def texts(session, settings, sampling=None, prompt="Once upon a time"):
    """Base text, steered text and the tokens' divergence."""
    sampling = sampling or Sampling(12)
    ids = session.prompt_ids(prompt, chat=False)
    with session.unsteered():
        *_, (base, _) = session.generate(ids, sampling)
    with session.steered(settings):
        *_, (steered, new) = session.generate(ids, sampling)
    return base, steered, session.divergence(ids, new, settings)


@pytest.mark.parametrize("sampling", [Sampling(12), Sampling(12, temperature=1.0, seed=3)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", CONFIGS)
def test_strength_zero_is_the_base(name, sampling, folder, tiny_llama):
    session = session_of(tiny_llama, {"a": folder(name)})
    if name != "joint":  # whose strength is of LoRA as well
        base, steered, kls = texts(session, Settings(("a",), 0.0), sampling)
        assert steered == base
        assert max(kls) == 0
    base, steered, kls = texts(session, Settings(("a",), 3.0), sampling)
    assert steered != base
    assert max(kls) > 0.01
    assert texts(session, Settings(()), sampling)[1] == base


def test_joint_at_zero_is_the_base(folder, tiny_llama):
    session = session_of(tiny_llama, {"a": folder("joint")})
    base, steered, kls = texts(session, Settings(("a",), 0.0))
    assert steered == base
    assert max(kls) < 1e-6


def test_divergence_is_that_of_the_adapter(folder, tiny_llama):
    """`KL(steered || base)` written out, from PEFT's own model."""
    path = folder("post_block")
    session = session_of(tiny_llama, {"a": path})
    ids, new = session.prompt_ids("Once upon", chat=False), [5, 9, 20]
    found = session.divergence(ids, new, Settings(("a",), 2.0))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), path).eval()
    model.base_model.set_scale("default", 2.0)
    whole = torch.cat([ids, torch.tensor([new])], 1)
    with torch.no_grad():
        p = model(whole).logits.softmax(-1)[0, ids.shape[1] - 1 : -1]
        q = model.unload()(whole).logits.softmax(-1)[0, ids.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.tensor(found), (p * (p / q).log()).sum(-1), atol=1e-5, rtol=1e-4)


def logits(session, settings):
    ids = session.prompt_ids("Once upon", chat=False)
    with session.steered(settings), torch.no_grad():
        return session.model(ids).logits


def test_adapters_add_up(folder, tiny_llama):
    """Vectors at the last block alone: what they add to its output adds up exactly."""
    paths = {"a": folder("vector", 1), "b": folder("vector", 2)}
    session = session_of(tiny_llama, paths)
    kept = []
    norm = session.model.get_base_model().model.norm
    handle = norm.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    for names in ((), ("a",), ("b",), ("a", "b")):
        logits(session, Settings(names, 1.0, "1"))
    handle.remove()
    none, a, b, both = kept
    torch.testing.assert_close(both - none, (a - none) + (b - none), atol=1e-5, rtol=0)
    assert (a - b).abs().max() > 0.1


def test_blocks_are_switched_off_and_on_again(folder, tiny_llama):
    session = session_of(tiny_llama, {"a": folder("vector")})
    everything = logits(session, Settings(("a",)))
    only_1 = logits(session, Settings(("a",), 1.0, "1"))
    assert (everything - only_1).abs().max() > 0.1
    assert torch.equal(logits(session, Settings(("a",), 1.0, "0-1")), everything)
    assert torch.equal(logits(session, Settings(("a",), 1.0, "")), logits(session, Settings(())))


@pytest.mark.parametrize(
    ("text", "blocks"),
    [("all", {0, 1, 2, 3}), ("0-2", {0, 1, 2}), ("1, 3", {1, 3}), ("", set()), (" ALL ", {0, 1, 2, 3})],
)
def test_blocks_as_text(text, blocks):
    assert parse_blocks(text, {0, 1, 2, 3}) == blocks


@pytest.mark.parametrize(
    ("text", "message"), [("x", "'x' is neither a number"), ("2-9", "are not steered"), ("-1", "'-1'")]
)
def test_blocks_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        parse_blocks(text, {0, 1, 2, 3})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("names", [("a",), ("a", "b"), ()])
def test_the_code_gives_the_steered_text(names, temperature, folder, tiny_llama, capsys):
    session = session_of(tiny_llama, {"a": folder("vector", 1), "b": folder("vector", 2)})
    settings, sampling = Settings(names, 1.5, "1"), Sampling(10, temperature, seed=7)
    steered = texts(session, settings, sampling, 'It\'s "here"')[1]
    code = as_code(session, settings, sampling, 'It\'s "here"', chat=False)
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out == steered + "\n"


def test_a_quantized_base(folder, tiny_llama):
    session = session_of(tiny_llama, {"a": folder("vector")}, bits=8)
    base, steered, kls = texts(session, Settings(("a",), 0.0))
    assert (steered, max(kls)) == (base, 0)
    assert texts(session, Settings(("a",), 3.0))[1] != base
    code = as_code(session, Settings(("a",)), Sampling(), "x", chat=False)
    assert "quantization_config=BitsAndBytesConfig(load_in_8bit=True)" in code


def test_the_base_is_generated_once_for_many_strengths(folder, tiny_llama, monkeypatch):
    session, memory = session_of(tiny_llama, {"a": folder("vector")}), {}
    calls = []
    generate = session.generate
    monkeypatch.setattr(session, "generate", lambda *args: calls.append(1) or generate(*args))
    shown = []
    for scale in (0.0, 2.0):
        *_, last = respond(session, memory, "Once", False, ["a"], scale, "all", 8, 0.0, 0)
        shown.append(last)
    assert len(calls) == 3
    assert shown[0][0] == shown[0][1] == shown[1][0] != shown[1][1]


def test_an_error_in_generation_is_raised(folder, tiny_llama, monkeypatch):
    session = session_of(tiny_llama, {"a": folder("vector")})

    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(session.model, "generate", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(session.generate(session.prompt_ids("x", chat=False), Sampling()))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--adapter", "DIR"], "write NAME=DIR"),
        (["--adapter", "a=VECTOR", "--adapter", "a=VECTOR"], "two adapters 'a'"),
        (["--adapter", "a=VECTOR", "--adapter", "b=JOINT"], "adapters of one type"),
        (["--adapter", "a=VECTOR", "--load-in-4bit", "--load-in-8bit"], "contradicts"),
        (["--adapter", "a=missing"], "Can't find 'adapter_config.json' at 'missing'"),
        (["--adapter", "a=VECTOR", "--model", "no/such-model"], "--model: 'no/such-model' cannot be loaded"),
    ],
)
def test_command_refuses(flags, message, folder, tiny_llama, capsys):
    paths = {"VECTOR": folder("vector"), "JOINT": folder("joint")}
    for name, path in paths.items():
        flags = [flag.replace(name, path) for flag in flags]
    assert peft_steer("play", "--model", tiny_llama, *flags) == 2
    assert message in capsys.readouterr().err


def test_prompts_that_are_none(folder, tiny_llama):
    session = session_of(tiny_llama, {"a": folder("vector")})
    for prompt, chat, message in (("  ", False, "Write a prompt"), ("x", True, "no chat template")):
        with pytest.raises(ValueError, match=message):
            session.prompt_ids(prompt, chat)
