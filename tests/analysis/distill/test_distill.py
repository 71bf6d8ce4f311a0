"""`peft-steer distill`: what can be recovered is, in the adapter that is saved."""

import json

import pytest
import torch
from analysis_models import load_quantized, pair_of, random_texts, save_tuned, tuned_blocks, with_adapter
from command_line import peft_steer
from peft import PeftModel, get_peft_model
from tiny import DECODERS, make, randomize
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_steer import SteerConfig
from peft_steer.analysis.capture.steering import record
from peft_steer.analysis.capture.streams import streams
from peft_steer.analysis.distill.fitting import fit_blocks
from peft_steer.analysis.distill.students import adapter_of, distances
from peft_steer.analysis.inputs.pairs import Pair, blocks_of
from peft_steer.analysis.inputs.texts import Texts


def linear(base: torch.nn.Module, **changes) -> PeftModel:
    """`base` with a random linear adapter at the blocks' outputs."""
    config = {"kind": "linear", "use_bias": True, "r": 2, **changes}
    model = get_peft_model(base, SteerConfig(**config))
    randomize(model, std=0.3)
    return model.eval().requires_grad_(False)


def texts(seed: int = 0) -> Texts:
    return random_texts(rows=60, length=12, seed=seed, batch_size=16)


def kl_to_tuned(pair: Pair, **models: torch.nn.Module) -> list[float]:
    return [found.summary()["kl"] for found in distances(pair, models, texts(seed=1))]


@pytest.mark.parametrize("architecture", DECODERS)
def test_streams_are_the_states_of_a_forward_pass(architecture):
    base = make(architecture)
    tuned = tuned_blocks(base)
    tuned.get_input_embeddings().weight.data += 0.1
    rows = random_texts(rows=5, batch_size=3)
    with streams({"base": base, "tuned": tuned}, (rows,)) as states, torch.no_grad():
        for name, model in (("base", base), ("tuned", tuned)):
            for index, batch in enumerate(rows):
                with record(model, ("block",)) as expected:
                    model(**batch.inputs(model))
                for (_, i), h in sorted(expected.items()):
                    found = states.through(blocks_of(model)[i].module, i, name, index)
                    states.write(name, index, found)
                    torch.testing.assert_close(states.read(name, index), h)


def test_a_linear_adapter_is_recovered():
    pair = Pair(make(), linear(make()), None)
    blocks = fit_blocks(pair, texts(), texts(seed=1), r=2)
    assert max(block.error_held_out for block in blocks) < 1e-4
    student = adapter_of(pair, blocks)
    base_kl, kl = kl_to_tuned(pair, base=pair.base, student=student)
    assert base_kl > 1e-3
    assert kl < 1e-7
    for name, theirs in pair.tuned.named_modules():
        if name.endswith("steer_edit.default"):
            M, b = student.get_submodule(name).affine()
            torch.testing.assert_close(M, theirs.affine()[0], atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(b, theirs.affine()[1], atol=1e-3, rtol=1e-3)


def test_ranks_follow_the_error_that_is_allowed():
    pair = Pair(make(), linear(make(), r=4, rank_pattern={"layers.0": 1, "layers.2": 3}), None)
    blocks = fit_blocks(pair, texts(), texts(seed=1), max_error=1e-3)
    assert [block.r for block in blocks] == [1, 4, 3]
    student = adapter_of(pair, blocks)
    assert student.peft_config["default"].rank_pattern == {blocks[0].name: 1, blocks[2].name: 3}
    assert kl_to_tuned(pair, student=student)[0] < 1e-7


def test_a_looser_error_takes_smaller_ranks(caplog):
    pair, ranks = pair_of(), {}
    for max_error in (0.05, 0.6):
        blocks = fit_blocks(pair, texts(), texts(seed=1), max_error=max_error)
        ranks[max_error] = sum(block.r for block in blocks)
        for block in blocks:
            assert block.error_held_out <= max_error or f"{block.name}: no rank reaches" in caplog.text
    assert ranks[0.6] < ranks[0.05]


@torch.no_grad()
def test_errors_are_those_of_the_adapter(caplog):
    base = make()
    pair = Pair(base, tuned_blocks(base), None)
    few, others = (random_texts(rows=16, length=12, seed=seed, batch_size=16) for seed in (0, 1))
    blocks = fit_blocks(pair, few, others, max_error=0.8)
    models = {"ours": adapter_of(pair, blocks), "theirs": pair.tuned, "base": base}
    errors = {}
    for name, texts in (("error", few), ("error_held_out", others)):
        squares = torch.zeros(2, len(blocks), dtype=torch.float64)
        for ids, _ in texts.rows:  # each row by itself: no padding
            states = {}
            for model in models:
                with record(models[model], ("block",)) as outputs:
                    models[model](input_ids=torch.tensor([ids]))
                states[model] = torch.stack([outputs["block", i][0] for i in range(len(blocks))]).double()
            weight = 1 / states["base"].square().sum(-1)
            for row, model in zip(squares, ("ours", "base"), strict=True):
                row += (weight * (states["theirs"] - states[model]).square().sum(-1)).sum(1)
        errors[name] = (squares[0] / squares[1]).sqrt().tolist()
    for name, expected in errors.items():
        assert [getattr(block, name) for block in blocks] == pytest.approx(expected, rel=1e-3)
    for block in blocks:  # (with so little text, the errors on it are much smaller)
        assert block.error < 0.9 * block.error_held_out
        assert block.error_held_out <= 0.8 or f"{block.name}: no rank reaches" in caplog.text


def test_only_blocks_that_can_differ_are_steered():
    pair = Pair(make(), linear(make(), layers_to_transform=[1]), None)
    blocks = fit_blocks(pair, texts(), texts(seed=1), r=2)
    assert [block.name for block in blocks] == ["model.layers.1", "model.layers.2"]
    assert kl_to_tuned(pair, student=adapter_of(pair, blocks))[0] < 1e-7


@pytest.mark.parametrize("name", ["lora", "full"])
def test_fine_tuning_is_approached_by_rank(name):
    base = make()
    pair = Pair(base, tuned_blocks(base, std=0.02) if name == "full" else with_adapter(base, name), None)
    students = {f"r{r}": adapter_of(pair, fit_blocks(pair, texts(), texts(seed=1), r=r)) for r in (2, 24)}
    base_kl, low, high = kl_to_tuned(pair, base=base, **students)
    assert high < 0.7 * base_kl  # (what is left is not linear)
    assert high < 1.02 * low


@pytest.mark.parametrize("precision", ["nf4", "int8", "bf16"])
def test_bases_of_other_precisions(tiny_llama, precision):
    base = load_quantized(tiny_llama, precision)
    pair = Pair(base, with_adapter(base, "post_block"), None)
    base_kl, kl = kl_to_tuned(pair, base=base, student=adapter_of(pair, fit_blocks(pair, texts(), texts(seed=1))))
    assert kl < 0.3 * base_kl


def test_the_command(tiny_llama, tmp_path, capsys):
    tuned = save_tuned(tiny_llama, tmp_path / "tuned", "lora")
    out = tmp_path / "out"
    arguments = ["--base", tiny_llama, "--tuned", tuned, "--task", "listops_short", "--num-texts", "24"]
    arguments += ["--held-out", "6", "-o", str(out), "--max-error", "0.5", "--train-steps", "3", "--from-scratch"]
    assert peft_steer("distill", *arguments, "--evaluate", "--limit", "4") == 0
    printed = capsys.readouterr().out
    assert f"peft={out}" in printed
    result = json.loads((out / "distill.json").read_text())
    found = result["models"]
    assert list(found) == ["base", "tuned", "fitted", "distilled", "from scratch"]
    assert found["tuned"]["kl"] == 0
    assert found["tuned"]["agreement"] == 1
    assert found["fitted"]["kl"] < found["base"]["kl"]
    assert all(model["n"] == 4 and 0 <= model["acc"] <= 1 for model in found.values())
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), str(out))
    assert sum(p.numel() for k, p in model.named_parameters() if "steer_edit" in k) == found["distilled"]["parameters"]
    edits = [m for name, m in model.named_modules() if name.endswith("steer_edit.default")]
    assert [len(edit.W_down) for edit in edits] == [block["r"] for block in result["blocks"]]
    assert all(edit.W_up.abs().max() > 0 for edit in edits)
    assert model.peft_config["default"].base_model_name_or_path == tiny_llama
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(tiny_llama).get_vocab()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--r", "0"], "argument --r: must be at least 1, not 0"),
        (["--r", "33"], "--r is 33, more than the hidden size 32"),
        (["--max-error", "0"], "argument --max_error: must be above 0, not 0"),
        (["--ridge=-1"], "argument --ridge: must be at least 0, not -1"),
        (["--from-scratch=0"], "argument --from_scratch: must be above 0, not 0"),
        (["--learning-rate=0"], "argument --learning_rate: must be above 0, not 0"),
        (["--learning-rate", "1e-3"], "--learning_rate is 0.001, which needs --train_steps"),
        (["--limit", "5"], "--limit is 5, which needs --evaluate"),
        (["--evaluate", "--dataset", "x"], "--evaluate needs a --task to score on"),
        (["--dataset", "x"], "--task, --dataset: give one of them"),
    ],
)
def test_bad_input(tiny_llama, tmp_path, capsys, monkeypatch, flags, message):
    tuned = save_tuned(tiny_llama, tmp_path / "tuned", "lora")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # nothing is loaded before the message
    task = [] if "--evaluate" in flags else ["--task", "listops_short"]
    assert (
        peft_steer("distill", "--base", tiny_llama, "--tuned", tuned, *task, "-o", str(tmp_path / "out"), *flags) == 2
    )
    assert message in capsys.readouterr().err


def test_what_cannot_be_distilled(tiny_llama, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("".join(f"{a}+{a}={a + a}\n" for a in range(12)))
    arguments = ["--base", tiny_llama, "--dataset", str(tmp_path / "text.txt"), "-o", str(tmp_path / "out")]
    assert peft_steer("distill", *arguments, "--tuned", tiny_llama) == 2
    assert "there is nothing to distil" in capsys.readouterr().err
    model = linear(AutoModelForCausalLM.from_pretrained(tiny_llama), positions="last")
    model.save_pretrained(tmp_path / "last")
    assert peft_steer("distill", *arguments, "--tuned", str(tmp_path / "last")) == 2
    assert "positions='last'" in capsys.readouterr().err
