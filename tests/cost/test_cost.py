"""`peft-steer cost`: exact bytes, the reference points, and the command itself."""

import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from command_line import peft_steer
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_steer import SteerConfig
from peft_steer.cost import measure, saved_bytes
from peft_steer.cost.allocator import peak_bytes
from peft_steer.cost.methods import FLOOR, PRESETS, adapt, parse_method, share


ROWS, LENGTH = 4, 16
HIDDEN_STATE = ROWS * LENGTH * tiny.D * 4  # bytes in fp32
SHORT = ["--rounds", "3", "--batch_size", "2", "--length", "8", "--new_tokens", "2"]
CHECKPOINTED = pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])


def batch() -> dict:
    ids = tiny.inputs(rows=ROWS, length=LENGTH)["input_ids"]
    return {"input_ids": ids, "labels": ids.clone(), "use_cache": False}


def kept(model, checkpointed: bool = False) -> int:
    with measure.checkpointing(model, checkpointed):
        return saved_bytes(model, batch())


class Saves(nn.Module):
    """Keeps what can be counted by hand, and makes a cache in its first forward."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.cache = None

    def forward(self, x, labels):
        if self.cache is None:
            self.cache = torch.ones(1000)
        hidden = torch.relu(x @ self.weight)  # relu and the next product keep the same (100, 8)
        scores = hidden.view(50, 16).view(100, 8) @ self.weight  # kept by the square
        unused = scores.exp()  # noqa: F841  (kept by no one)
        return SimpleNamespace(loss=scores.square().sum())


SAVED = 2 * 100 * 8 * 4 + 4  # two activations and the loss itself; no parameter, no input, no cache


def test_saved_bytes_are_exact():
    model, x = Saves(), torch.randn(100, 8)
    assert saved_bytes(model, {"x": x, "labels": None}) == SAVED
    assert saved_bytes(model, {"x": x, "labels": None}) == SAVED


def test_saved_bytes_restores_the_mode_and_works_without_grad():
    model = Saves().eval()
    with torch.no_grad():
        assert saved_bytes(model, {"x": torch.randn(100, 8), "labels": None}) == SAVED
    assert not model.training


def test_saved_bytes_needs_a_loss():
    with pytest.raises(ValueError, match=r"returned no loss.*labels"):
        saved_bytes(tiny.make(), tiny.inputs())


def test_peak_bytes_are_exact():
    def function():
        first = torch.empty(1000, dtype=torch.uint8)
        second = torch.empty(500, dtype=torch.uint8)
        del first, second
        return torch.empty(1200, dtype=torch.uint8)

    assert peak_bytes(function, torch.device("cpu")) == 1500


@CHECKPOINTED
def test_the_floor_is_a_gradient_at_the_first_blocks_output(checkpointed):
    model = tiny.make()
    leaf = torch.zeros(tiny.D, requires_grad=True)
    model.model.layers[0].register_forward_hook(lambda module, args, output: output + leaf)
    assert kept(adapt(tiny.make(), FLOOR), checkpointed) == kept(model, checkpointed)


@CHECKPOINTED
@pytest.mark.parametrize("kind", list(tiny.KINDS))
def test_steering_keeps_no_hidden_state_that_is_not_kept_anyway(kind, checkpointed):
    model = get_peft_model(tiny.make(), SteerConfig(r=1, task_type="CAUSAL_LM", **tiny.KINDS[kind]))
    extra = kept(model, checkpointed) - kept(adapt(tiny.make(), FLOOR), checkpointed)
    assert 0 <= extra < HIDDEN_STATE


def test_with_checkpointing_in_bf16_only_the_last_blocks_output_is_extra():
    floor, model = (adapt(tiny.make(dtype=torch.bfloat16), name) for name in (FLOOR, "STEER:kind=nonlinear,r=1"))
    assert kept(model, True) - kept(floor, True) < 2 * (HIDDEN_STATE // 2)


def test_nothing_is_kept_below_the_lowest_steered_block():
    sizes = [kept(adapt(tiny.make(), f"STEER:kind=linear,layers_to_transform={i}")) for i in range(3)]
    block = sizes[0] - sizes[1]
    assert block > 5 * HIDDEN_STATE
    assert sizes[1] - sizes[2] == pytest.approx(block, rel=0.02)  # the rotary angles go with the last block


def test_checkpointing_ends_with_its_context():
    model = adapt(tiny.make(), "post_block")
    before = kept(model)
    assert kept(model, checkpointed=True) < before / 2
    assert kept(model) == before


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_train(name):
    model = adapt(tiny.make(), name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step = measure.training_step(model, batch())
    step()
    step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    first = {n for n, _ in model.named_parameters() if name == "lofit" and n.endswith(".v")}  # its second stage's
    assert changed == {n for n, p in model.named_parameters() if p.requires_grad} - first


def test_any_peft_method_can_be_written_out():
    config = parse_method("LORA:r=3,target_modules=[q_proj, v_proj],lora_dropout=5e-1")
    assert (type(config), config.r, config.target_modules, config.lora_dropout) == (
        LoraConfig, 3, {"q_proj", "v_proj"}, 0.5,
    )  # fmt: skip
    config = parse_method("STEER:kind=linear,use_bias=true,site=mlp")
    assert (config.kind, config.use_bias, config.site) == ("linear", True, "mlp")
    assert parse_method("IA3").peft_type == "IA3"


def test_a_saved_adapters_config_is_a_method(tmp_path):
    adapt(tiny.make(), "LORA:r=5,target_modules=[q_proj]").save_pretrained(tmp_path)
    model = adapt(tiny.make(), str(tmp_path / "adapter_config.json"))
    assert model.peft_config["default"].r == 5
    assert model.get_nb_trainable_parameters()[0] > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lorra", "method 'lorra': no PEFT type 'lorra'. Presets: lora, post_block"),
        ("LORA:rank=3", "method 'LORA:rank=3'.*unexpected keyword argument 'rank'"),
        ("STEER:kind=cubic", "method 'STEER:kind=cubic'.*`kind='cubic'` is unknown"),
        ("LORA:r", "method 'LORA:r': every field needs a value"),
        ("nowhere/adapter_config.json", "No such file"),
    ],
)
def test_a_wrong_method_says_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        parse_method(text)


def test_a_method_that_does_not_fit_the_model_is_named():
    with pytest.raises(ValueError, match=r"method 'LORA:target_modules=nowhere' on LlamaForCausalLM.*nowhere"):
        adapt(tiny.make(), "LORA:target_modules=nowhere")


def test_copies_share_the_weights_and_nothing_else():
    base = tiny.make()
    weights = {name: p.clone() for name, p in base.state_dict().items()}
    model = adapt(base, "post_block")
    measure.training_step(model, batch())()
    assert model.get_base_model().model.layers[1].mlp.up_proj.weight is base.model.layers[1].mlp.up_proj.weight
    assert share(base).lm_head.weight is base.lm_head.weight
    assert not tiny.steer_layers(base)
    assert not any(module._forward_hooks for module in base.modules())
    assert all(torch.equal(p, weights[name]) for name, p in base.state_dict().items())


def test_rounds_are_interleaved_and_the_first_does_not_count():
    calls = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    seconds = measure.interleaved_seconds(functions, rounds=8, device=torch.device("cpu"), seed=0, label="test")
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 9
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 1
    assert {name: len(times) for name, times in seconds.items()} == {"a": 8, "b": 8, "c": 8}


@pytest.fixture
def model_dir(tmp_path):
    tiny.make().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_command_measures_all_methods_side_by_side(model_dir, tmp_path, capsys):
    output = tmp_path / "cost.json"
    methods = ["--method", "post_block", "--method", "IA3"]
    assert peft_steer("cost", "--model", model_dir, *methods, *SHORT, "--output", str(output)) == 0

    table = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    header, rows = [cell.strip() for cell in table[0]], {row[1].strip(): row for row in table[2:]}
    assert list(rows) == ["floor", "lora", "post_block", "IA3"]
    cell = {name: dict(zip(header, (c.strip() for c in row), strict=True)) for name, row in rows.items()}
    assert cell["post_block"]["trainable"] == f"{3 * 2 * 8 * tiny.D:,}"
    assert float(cell["floor"]["kept, float32"]) == 1
    assert float(cell["lora"]["kept, bfloat16"]) > float(cell["post_block"]["kept, bfloat16"]) > 1
    assert cell["floor"]["step / floor"] == cell["lora"]["step / lora"] == "1.000 (1.000-1.000)"

    results = json.loads(output.read_text())
    assert len(results["base"]["decode_seconds"]) == 3
    for name, row in results["methods"].items():
        assert len(row["step_seconds"]) == 3
        assert row["peak_bytes"] > row["saved_bytes"]["float32"] > row["saved_bytes"]["float32 + checkpointing"] > 0
        assert ("decode_seconds" in row) == (name != "floor")
        assert row["file_bytes"] > 4 * row["trainable"]


def test_random_weights_need_only_a_config(model_dir, tmp_path, capsys):
    (tmp_path / "model" / "model.safetensors").unlink()
    arguments = ["--dtype", "float32", "--method", "vector", *SHORT]
    assert peft_steer("cost", "--model", model_dir, *arguments) == 2
    assert "model.safetensors" in capsys.readouterr().err
    assert peft_steer("cost", "--model", model_dir, "--random_weights", *arguments) == 0
    assert "(random weights)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "1"], "argument --rounds: must be at least 2, not 1"),
        (["--length", "1"], "argument --length: must be at least 2, not 1"),
        (["--length", "65"], "exceeds the 64 positions"),
        ([*SHORT, "--method", "STEER:r=99"], "method 'STEER:r=99' on LlamaForCausalLM"),
        (["--output", "nowhere/cost.json"], "there is no directory 'nowhere'"),
    ],
)
def test_bad_arguments_are_refused(model_dir, capsys, arguments, message):
    assert peft_steer("cost", "--model", model_dir, *arguments) == 2
    assert message in capsys.readouterr().err


def test_generated_tokens_are_the_bases_at_the_start():
    base, steered = tiny.make(), adapt(tiny.make(), "post_block")
    assert isinstance(steered, PeftModel)
    prompt = tiny.inputs(rows=1)["input_ids"]
    calls = []
    for model in (base, steered):
        generate = model.generate
        model.generate = lambda generate=generate, **kwargs: calls.append(generate(**kwargs))
        measure.greedy_decoding(model, prompt, 5)()
    assert calls[0].shape == (1, prompt.shape[1] + 5)
    assert torch.equal(calls[0], calls[1])
