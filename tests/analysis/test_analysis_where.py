"""`peft-steer analyze where`: the shares of a block's change, against the block's equations written plainly."""

import json

import pandas as pd
import pytest
import tiny
import torch
from analysis_models import analyze, pair_of, random_texts, with_adapter
from peft import LoraConfig

from peft_steer import SteerConfig
from peft_steer.analysis.capture.terms import TERMS, Terms
from peft_steer.analysis.inputs.pairs import Pair, blocks_of
from peft_steer.analysis.where import measure


def terms_of_llama(model, layer, x: torch.Tensor) -> torch.Tensor:
    """`x`, the attention's output and the MLP's of one block, written out: `(3, tokens, d)`."""
    rotary = model.model.rotary_emb(x, torch.arange(x.shape[1])[None])
    a = layer.self_attn(layer.input_layernorm(x), position_embeddings=rotary, attention_mask=None)[0]
    m = layer.mlp(layer.post_attention_layernorm(x + a))
    return torch.stack([x[0], a[0], m[0]]).double()


@torch.no_grad()
def test_shares_are_those_of_the_equations():
    pair, texts = pair_of(), random_texts()
    table = measure(pair, texts).set_index(["of", "block"])
    tuned = pair.tuned.get_base_model()
    i, found, outputs = 1, {"own": [], "stream": []}, []
    for ids, _ in texts.rows:
        ids = torch.tensor([ids])
        x, y = (m(ids, output_hidden_states=True).hidden_states[i] for m in (pair.base, tuned))
        base = terms_of_llama(pair.base, pair.base.model.layers[i], x)
        outputs.append(base.sum(0))
        found["own"].append(terms_of_llama(tuned, tuned.model.layers[i], x) - base)
        found["stream"].append(terms_of_llama(tuned, tuned.model.layers[i], y) - base)
    outputs = torch.cat(outputs)
    for name, changes in found.items():
        row, change = table.loc[name, i], torch.cat(changes, dim=1)
        total = change.sum(0)
        for k, term in enumerate(TERMS[:3]):
            share = (change[k] * total).sum(-1) / total.square().sum(-1)
            reached = 1 - (total - change[k]).square().sum(-1) / total.square().sum(-1)
            norm = (change[k].square().sum(-1) / total.square().sum(-1)).mean().sqrt()
            assert row[f"share_{term}"] == pytest.approx(share.mean().item(), abs=1e-4)
            assert row[f"reached_{term}"] == pytest.approx(reached.mean().item(), abs=1e-4)
            assert row[f"norm_{term}"] == pytest.approx(norm.item(), abs=1e-4)
        size = (total.norm(dim=-1) / outputs.norm(dim=-1)).mean()
        assert row["change"] == pytest.approx(size.item(), rel=1e-4)
    x, out = (hidden.double() for hidden in _hidden(pair.base, texts, i))
    mlp = pair.base.model.layers[i].mlp(pair.base.model.layers[i].post_attention_layernorm((x + out).float()))
    assert table.loc["own", i]["size_attention"] == pytest.approx(
        (out.norm(dim=-1) / x.norm(dim=-1)).mean().item(), rel=1e-4
    )
    assert table.loc["own", i]["size_mlp"] == pytest.approx(
        (mlp.norm(dim=-1) / (x + out).norm(dim=-1)).mean().item(), rel=1e-4
    )


def _hidden(model, texts, i):
    """`x` and `a` of block `i` at all tokens."""
    found = []
    for ids, _ in texts.rows:
        x = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[i]
        found.append(terms_of_llama(model, model.model.layers[i], x)[:2])
    return torch.cat(found, dim=1)


def test_a_change_in_one_place_is_found_there():
    pair = pair_of(adapter=LoraConfig(r=4, target_modules=["down_proj"], layers_to_transform=[0]))
    table = measure(pair, random_texts()).set_index(["of", "block"])
    own, stream = table.loc["own"], table.loc["stream"]
    assert own.loc[0, "share_mlp"] == pytest.approx(1, abs=1e-4)
    assert own.loc[0, "share_attention"] == pytest.approx(0, abs=1e-4)
    assert (own.loc[1:, "change"] == 0).all()
    assert own.loc[1:, "share_mlp"].isna().all()
    assert (stream.loc[1:, "share_skip"] > 0.3).all()


@pytest.mark.parametrize("architecture", tiny.DECODERS)
def test_post_block_steering_is_an_edit_in_every_architecture(architecture):
    table = measure(pair_of(architecture, SteerConfig(r=4)), random_texts()).set_index(["of", "block"])
    assert table.loc["own", "share_edit"].tolist() == pytest.approx([1, 1, 1], abs=1e-3)
    shares = table[[f"share_{term}" for term in TERMS]]
    assert shares.sum(axis=1).tolist() == pytest.approx([1] * 6)


def test_post_norm_blocks_are_refused():
    model = tiny.make("bert")
    for p in model.bert.encoder.parameters():
        p.data.mul_(10)  # at first the terms are so small that the norms do nothing
    terms = Terms(blocks_of(model))
    with terms.recording(), torch.no_grad():
        model(**tiny.inputs())
    with pytest.raises(ValueError, match="not its input plus"):
        terms.check_sums(torch.ones(2, 7, dtype=torch.bool))


@torch.no_grad()
def test_scaled_blocks_are_refused():
    config = tiny.tf.GraniteConfig(**tiny.SMALL, residual_multiplier=0.5)
    base = tiny.tf.GraniteForCausalLM(config).eval()
    with pytest.raises(ValueError, match="not its input plus"):
        measure(Pair(base, with_adapter(base), None), random_texts())


def test_shares_are_of_the_tokens_that_change():
    table = measure(pair_of(adapter=SteerConfig(r=4, positions="last")), random_texts()).set_index(["of", "block"])
    assert table.loc["own", "share_edit"].tolist() == pytest.approx([1, 1, 1], abs=1e-3)


def test_nothing_is_left_behind():
    model = with_adapter(tiny.make())
    before = tiny.logits(model)
    terms = Terms(blocks_of(model))
    with terms.recording([torch.zeros(2, 7, tiny.D)] * 3):
        assert not torch.equal(tiny.logits(model), before)
    assert torch.equal(tiny.logits(model), before)


def test_command(tiny_llama, tmp_path, capsys):
    assert analyze(tmp_path, tiny_llama, "where") == 0
    table = pd.read_csv(tmp_path / "out" / "where.csv")
    facts = json.loads((tmp_path / "out" / "where.json").read_text())
    assert len(table) == len(facts["rows"]) == 4
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"where.{s}" for s in ("csv", "json", "png", "svg")
    }
    assert "The MLP's share of what a block changes" in capsys.readouterr().out
