"""`peft-steer analyze linear`: maps of the oracle, and how near models steered by them come."""

import json

import pandas as pd
import pytest
import torch
from analysis_models import pair_of, random_texts, save_tuned, with_adapter
from command_line import peft_steer
from peft import get_peft_model
from tiny import make, randomize

from peft_steer import SteerConfig
from peft_steer.analysis.capture.steering import record
from peft_steer.analysis.inputs.pairs import Pair
from peft_steer.analysis.linear import _measured, fit_maps


def texts(seed: int = 0):
    return random_texts(rows=60, length=12, seed=seed, batch_size=16)


@pytest.mark.parametrize("use_bias", [True, False])
def test_a_linear_edit_is_found_from_its_rank_on(use_bias):
    tuned = get_peft_model(make(), SteerConfig(kind="linear", r=3, use_bias=use_bias, layers_to_transform=[1, 2]))
    randomize(tuned, std=0.3)
    pair = Pair(make(), tuned.eval().requires_grad_(False), None)
    maps, errors = fit_maps(pair, texts(), texts(seed=1), [1, 3, 8])
    assert sorted(maps["affine"]) == [1, 2]  # block 0 is the base's
    errors = errors.set_index(["kind", "r", "block"])["error_held_out"]
    assert max(errors["affine", 3].max(), errors["affine", 8].max()) < 1e-3
    assert errors["affine", 1].min() > 10 * errors["affine", 3].max()
    assert (errors["linear", 3].max() < 1e-3) != use_bias
    base, steered = (
        _measured(pair, texts(seed=1), texts(seed=2), steering)
        for steering in (None, {i: each.of_rank(3) for i, each in maps["affine"].items()})
    )
    for name in ("kl", "kl_answer", "kl_generated"):
        assert steered[name] < 1e-6 < 1e-4 < base[name]


@torch.no_grad()
def test_errors_are_those_of_the_maps():
    pair = pair_of()
    maps, errors = fit_maps(pair, texts(), texts(seed=1), [4])
    errors = errors.set_index(["kind", "block"]).loc[[("linear", 1), ("affine", 1)]]
    layer = pair.base.model.layers[1]
    for column, seed in (("error", 0), ("error_held_out", 1)):
        states = []
        for ids, _ in texts(seed).rows:  # each row by itself: no padding
            with record(pair.tuned, ("block",)) as targets:
                pair.tuned(input_ids=torch.tensor([ids]))
            angles = pair.base.model.rotary_emb(targets["block", 0], torch.arange(len(ids))[None])
            h = layer(targets["block", 0], position_embeddings=angles, attention_mask=None)
            states.append(torch.cat([h, targets["block", 1] - h]))
        h, dh = torch.cat(states, dim=1).double()
        for kind in ("linear", "affine"):
            left = (dh - maps[kind][1].of_rank(4)(h)).norm(dim=-1) / h.norm(dim=-1)
            expected = left.square().sum().sqrt() / (dh.norm(dim=-1) / h.norm(dim=-1)).square().sum().sqrt()
            assert errors.loc[(kind, 1), column] == pytest.approx(expected.item(), rel=1e-4)
    assert fit_maps(pair, texts(), texts(), [4], ridge=0.3)[0]["affine"][1].ridge == 0.3


def test_an_adapter_is_measured_as_it_is():
    pair = pair_of()
    found = _measured(pair, texts(), texts(), model=with_adapter(pair.base, "lora"))
    assert found["kl"] == 0
    assert found["agreement_generated"] == 1
    one, other = (_measured(pair, *given) for given in ((texts(), texts(seed=1)), (texts(seed=1), texts())))
    assert one["kl_generated"] == other["kl_answer"] != one["kl_answer"]


def test_the_command(tiny_llama, tmp_path, capsys):
    tuned, other = (save_tuned(tiny_llama, tmp_path / name, name) for name in ("lora", "post_block"))
    (tmp_path / "sums.csv").write_text(
        "prompt,completion\n" + "".join(f"{a}+{b}=,is {a + b}\n" for a in range(6) for b in range(6))
    )
    arguments = ["--base", tiny_llama, "--tuned", tuned, "--dataset", str(tmp_path / "sums.csv")]
    arguments += ["-o", str(tmp_path / "out"), "--ranks", "2", "8", "--new_tokens", "4"]
    assert peft_steer("analyze", "linear", *arguments, "--compare", other, tuned) == 0
    result = json.loads((tmp_path / "out/linear.json").read_text())
    models = pd.DataFrame(result["rows"]).set_index(["model", "r"])
    assert [name for name, _ in models.index] == ["base", *["linear map"] * 2, *["affine map"] * 2, other, tuned]
    kl = models["kl_generated"].droplevel("r")
    assert kl[tuned] == 0
    assert kl["affine map"].max() < kl["base"]
    assert kl[other] > 0
    assert len(pd.read_csv(tmp_path / "out/linear_errors.csv")) == 2 * 2 * 2  # blocks, kinds, ranks
    assert (tmp_path / "out/linear.png").stat().st_size > 1000
    for flags, message in (
        (["--ranks", "64"], "--ranks: 64 is more than the hidden size 32"),
        (["--ridge=-1"], "argument --ridge: must be at least 0, not -1"),
        (["--compare", str(tmp_path)], "adapter_config.json"),
    ):
        assert peft_steer("analyze", "linear", *arguments, *flags) == 2
        assert message in capsys.readouterr().err
