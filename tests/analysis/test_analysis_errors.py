"""`peft-steer analyze errors`: gains against the Jacobian written out, ranks against all others, and the command."""

import itertools
import json

import pandas as pd
import pytest
import tiny
import torch
from analysis_models import analyze, pair_of, random_texts
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_steer import PostBlockSteerConfig
from peft_steer.analysis.error_growth import measure, own_changes
from peft_steer.analysis.inputs.pairs import Pair, blocks_of
from peft_steer.analysis.inputs.texts import Texts
from peft_steer.analysis.maths.allocation import by_energy, by_gain
from peft_steer.analysis.maths.jacobian import Tail, gains


def tail_of(architecture: str = "llama", dtype=torch.float64) -> Tail:
    model = tiny.make(architecture, dtype)
    model.set_experts_implementation("eager")
    return Tail(model.get_decoder(), blocks_of(model), {**tiny.inputs(architecture), "use_cache": False})


def relative_jacobian(tail: Tail, i: int, row: int) -> torch.Tensor:
    """Of one row, `(tokens * d, tokens * d)`, by reverse mode and with the scales written out."""
    h = tail.state(i)

    def function(x):
        return tail.after(i)(torch.stack([x if k == row else h[k] for k in range(len(h))]))[row]

    J = torch.autograd.functional.jacobian(function, h[row])  # (tokens, d, tokens, d)
    before, after = h[row].norm(dim=-1), function(h[row]).norm(dim=-1)
    return (J * before[None, None, :, None] / after[:, None, None, None]).flatten(2).flatten(0, 1)


def test_gains_are_those_of_the_jacobian():
    tail, mask = tail_of(), torch.ones(2, 7, dtype=torch.bool)
    with torch.no_grad():
        tail.model.norm.weight.copy_(torch.linspace(0.1, 3, tiny.D))  # else all tokens are of the same length
    largest, typical = gains(tail, 0, mask, iterations=25, generator=torch.Generator().manual_seed(0))
    draws = [gains(tail, 0, mask, 1, torch.Generator().manual_seed(seed))[1] for seed in range(12)]
    assert torch.equal(typical, draws[0])
    for row in range(2):
        J = relative_jacobian(tail, 0, row)
        assert largest[row].item() == pytest.approx(torch.linalg.matrix_norm(J, 2).item(), rel=1e-3)
        expected = J.norm().item() / len(J) ** 0.5
        assert torch.stack(draws)[:, row].square().mean().sqrt().item() == pytest.approx(expected, rel=0.08)


def test_padding_neither_errs_nor_counts():
    ids = tiny.inputs()["input_ids"]
    padded = {
        "input_ids": torch.nn.functional.pad(ids[:, :5], (0, 2)),
        "attention_mask": torch.tensor([[1] * 5 + [0] * 2] * 2),
    }
    model = tiny.make(dtype=torch.float64)
    found = [
        gains(
            Tail(model.get_decoder(), blocks_of(model), {**x, "use_cache": False}),
            1, mask, 20, torch.Generator().manual_seed(0),
        )[0]
        for x, mask in (
            ({"input_ids": ids[:, :5]}, torch.ones(2, 5, dtype=torch.bool)),
            (padded, padded["attention_mask"].bool()),
        )
    ]  # fmt: skip
    torch.testing.assert_close(found[0], found[1], rtol=2e-2, atol=0)


@pytest.mark.parametrize("architecture", [name for name in tiny.DECODERS if name != "bloom"])
def test_the_tail_is_the_model(architecture):
    tail, i = tail_of(architecture), 1
    h, function = tail.state(i), tail.after(i)
    expected = tail.model(**tail.inputs).last_hidden_state
    torch.testing.assert_close(function(h), expected, atol=1e-6, rtol=1e-5)
    mask = torch.ones(h.shape[:2], dtype=torch.bool)
    _, typical = gains(tail, i, mask, 1, torch.Generator().manual_seed(0))
    error = torch.randn(h.shape, generator=torch.Generator().manual_seed(0)).double()
    error = error / error.flatten(1).norm(dim=1)[:, None, None] * h.norm(dim=-1, keepdim=True)
    change = (function(h + 1e-3 * error) - function(h - 1e-3 * error)) / 2e-3 / expected.norm(dim=-1, keepdim=True)
    # (norms are computed in float32 even in a float64 model)
    torch.testing.assert_close(typical, change.flatten(1).norm(dim=1).double(), rtol=2e-3, atol=0)
    assert torch.equal(tail.model(**tail.inputs).last_hidden_state, expected)  # nothing is left behind


def test_models_without_forward_derivatives_are_refused():
    with pytest.raises(ValueError, match="no derivative in forward mode"):
        gains(tail_of("bloom"), 1, torch.ones(2, 7, dtype=torch.bool), 1, torch.Generator())


def test_ranks_by_energy_leave_out_the_least():
    spectra = [torch.tensor(values) for values in ([9.0, 4.0, 1.0, 0.5], [3.0, 0.5, 0.1, 0.0], [5.0, 4.9, 4.8, 0.1])]
    gain = [1.0, 3.0, 0.8]

    def left(ranks):
        return sum(g**2 * values[rank:].sum().item() for g, values, rank in zip(gain, spectra, ranks, strict=True))

    choices = [ranks for ranks in itertools.product(range(1, 5), repeat=3) if sum(ranks) == 6]
    assert by_energy(gain, spectra, 2) == list(min(choices, key=left))


def test_ranks_by_gain_follow_the_gains():
    assert by_gain([1.0, 2.0, 5.0], 8, 32) == [3, 6, 15]
    assert by_gain([1e-9, 1.0, 1.0], 2, 32) == [1, 3, 2] or by_gain([1e-9, 1.0, 1.0], 2, 32) == [1, 2, 3]
    assert by_gain([1e-9, 1e-9, 1.0], 1, 32) == [1, 1, 1]
    assert by_gain([1e-9, 1e-9, 1.0], 8, 10) == [7, 7, 10]
    assert by_gain([3.1, 1.9, 1.0], 2, 32) == [3, 2, 1]  # the largest remainder is rounded up
    assert by_gain([0.2, 0.2, 3.0, 4.6], 2, 32) == [1, 1, 2, 4]  # what is above its share gives to those at least 1


def test_spectra_are_of_what_each_block_has_to_add():
    pair, texts = pair_of(adapter=PostBlockSteerConfig(r=2, kind="linear")), random_texts()
    spectra = own_changes(pair, texts)
    for values in spectra:
        assert (values[:2] > 1e-6).all()
        assert (values[2:] < 1e-9).all()
    for i, layer in enumerate(list(tiny.steer_layers(pair.tuned).values())[:2]):  # (the last state is given normed)
        states = [pair.base(torch.tensor([ids]), output_hidden_states=True).hidden_states for ids, _ in texts.rows]
        h = torch.cat([each[i + 1][0] for each in states]).double()
        added = tiny.reference_delta(layer.steer_edit["default"], h) / h.norm(dim=-1, keepdim=True)
        expected = torch.linalg.eigvalsh(added.T @ added / len(added)).flip(0)
        torch.testing.assert_close(spectra[i][:2], expected[:2], rtol=1e-4, atol=0)


def test_the_table_is_of_probes_that_are_spread_over_the_texts():
    model, texts = tiny.make(), random_texts(rows=8)
    table = measure(model, texts, probes=4, iterations=3, seed=5)
    batch, generator = texts.batch(texts.rows[::2]), torch.Generator().manual_seed(5)
    tail = Tail(model.get_decoder(), blocks_of(model), batch.inputs(model))
    for i, row in table.iterrows():
        largest, typical = gains(tail, i, batch.tokens, 3, generator)
        assert row["largest"] == largest.max().item()
        assert row["typical"] == pytest.approx(typical.square().mean().item() ** 0.5)


@pytest.mark.parametrize("adapter", ["lora", None])
def test_command_prints_a_pattern_that_peft_steer_takes(adapter, tiny_llama, tmp_path, capsys):
    words = ["errors", "--probes", "2", "--iterations", "2", "--r", "3"]
    assert analyze(tmp_path, tiny_llama, *words, adapter=adapter) == 0
    found = json.loads((tmp_path / "out" / "errors.json").read_text())
    table = pd.read_csv(tmp_path / "out" / "errors.csv")
    column = "energy_rank" if adapter else "gain_rank"
    assert list(found["rank_pattern"].values()) == table[column].tolist()
    assert table[column].sum() == 6
    assert (table["largest"] >= 0.99 * table["typical"]).all()
    assert "rank_pattern: {model.layers.0: " in capsys.readouterr().out
    base, other = (AutoModelForCausalLM.from_pretrained(tiny_llama) for _ in range(2))
    if adapter:
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        rows = [(tokenizer(f"{a}+{b}={a + b}").input_ids, 4) for a in range(4) for b in range(4)]
        tuned = PeftModel.from_pretrained(other, tmp_path / adapter)
        spectra = own_changes(Pair(base, tuned, None), Texts(rows, 4, 0, "cpu"))
        assert table["energy"].tolist() == pytest.approx([values.sum().item() ** 0.5 for values in spectra], rel=1e-4)
        assert table["energy_rank"].tolist() == by_energy(table["typical"], spectra, 3)
    model = get_peft_model(base, PostBlockSteerConfig(rank_pattern=found["rank_pattern"]))
    ranks = [layer.steer_edit["default"].W_down.shape[0] for layer in tiny.steer_layers(model).values()]
    assert ranks == table[column].tolist()


def test_command_refuses(tiny_llama, tmp_path, capsys):
    for words, message in (
        (["--r", "33"], "--r is 33, more than the hidden size 32"),
        (["--probes", "99"], "there are 16 texts"),
        (["--iterations", "0"], "argument --iterations: must be at least 1, not 0"),
    ):
        assert analyze(tmp_path, tiny_llama, "errors", *words) == 2
        assert message in capsys.readouterr().err
