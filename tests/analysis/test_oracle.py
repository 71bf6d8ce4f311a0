"""The oracle reproduces the tuned model at the block's output; what is measured equals the plain computation."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from analysis_models import load_quantized, random_texts, save_tuned, tuned_blocks, with_adapter
from command_line import peft_steer
from tiny import DECODERS, VOCAB, inputs, logits, make
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from peft_steer.analysis.capture.generation import continuations
from peft_steer.analysis.capture.steering import edited, oracle, record
from peft_steer.analysis.inputs.pairs import Pair, blocks_of
from peft_steer.analysis.inputs.texts import Texts
from peft_steer.analysis.maths.distance import Distance
from peft_steer.analysis.maths.moments import Moments, spectrum
from peft_steer.analysis.oracle import UNSTEERED, measure


def distances(base, tuned) -> pd.DataFrame:
    return measure(Pair(base, tuned, None), random_texts())[0].set_index("site")


@pytest.mark.parametrize("architecture", DECODERS)
def test_at_the_block_it_reproduces_every_architecture(architecture):
    base = make(architecture)
    tuned = tuned_blocks(base)
    assert (logits(tuned, architecture) - logits(base, architecture)).abs().max() > 1e-3
    with oracle(base, tuned, ("block",)):
        torch.testing.assert_close(logits(base, architecture), logits(tuned, architecture), atol=1e-5, rtol=1e-4)
    assert not torch.equal(logits(base, architecture), logits(tuned, architecture))  # it is gone again


@pytest.mark.parametrize("name", ["lora", "post_block", "mlp"])
def test_sites_reach_what_fine_tuning_changed_there(name):
    found = distances(base := make(), with_adapter(base, name))
    assert found.loc["none", "kl"] > 1e-4
    assert found.loc["block", "kl"] <= 1e-6
    assert found.loc["block", "final_error"] < 1e-5
    assert found.loc["block", "agreement"] == found.loc["block", "agreement_answer"] == 1
    # Post-block steering is out of both branches' reach; LoRA acts in both, the MLP's adapter in one.
    assert (found.loc["attention+mlp", "kl"] <= 1e-6) == (name != "post_block")
    assert (found.loc["mlp", "kl"] <= 1e-6) == (name == "mlp")
    assert found.loc["attention", "kl"] > 1e-5


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_quantized_bases(tiny_llama, precision):
    base = load_quantized(tiny_llama, precision)
    tuned = with_adapter(base, "lora")
    found = distances(base, tuned)
    assert found.loc["block", "kl"] < 1e-4 * found.loc["none", "kl"]


def test_the_oracle_after_the_mlp_is_no_bound():
    base, texts = make(), random_texts()
    tuned = with_adapter(base, "lora")
    read: dict[int, torch.Tensor] = {}

    def keep(i):
        return lambda module, args: read.update({i: args[0]})  # the stream that the MLP's output is added to

    handles = [
        block.module.post_attention_layernorm.register_forward_pre_hook(keep(block.index)) for block in blocks_of(base)
    ]
    found = Distance()
    with torch.no_grad():
        for batch in texts:
            with record(tuned, ("block",)) as targets:
                reference = tuned(**batch.inputs(tuned)).logits
            with edited(base, ("mlp",), lambda place, m: targets["block", place[1]] - (read[place[1]] + m)):
                found.add(batch, reference, base(**batch.inputs(base)).logits)
    for handle in handles:
        handle.remove()
    assert found.summary()["kl"] < 1e-6


def test_a_head_that_changed_is_out_of_reach():
    base = make()
    tuned = tuned_blocks(base)
    tuned.lm_head.weight.data.add_(0.1 * torch.randn(tuned.lm_head.weight.shape))
    found = distances(base, tuned)
    assert found.loc["block", "final_error"] < 1e-5
    assert found.loc["block", "kl"] > 1e-4


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True}, {"use_cache": False}, {"cache_implementation": "static"}],
    ids=lambda options: "-".join(options) or "greedy",
)
def test_generation_is_the_tuned_model_s(options):
    base = make()
    tuned = with_adapter(base, "lora")
    common = {"attention_mask": torch.ones(2, 7, dtype=torch.long), "pad_token_id": 0, "eos_token_id": None}
    common |= {"max_new_tokens": 6, "min_new_tokens": 6, "return_dict_in_generate": True, "output_scores": True}

    def generate(model):
        torch.manual_seed(0)
        return model.generate(**inputs(), **common, **options)

    expected, plain = generate(tuned), generate(base)
    with oracle(base, tuned, ("block",)):
        found = generate(base)
        again = generate(base)  # another cache
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(again.sequences, expected.sequences)
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert not torch.equal(plain.sequences, expected.sequences)


def test_continuations_are_those_of_each_prompt_alone():
    model = tuned_blocks(make(), std=0.3)  # (in the small one tokens hardly read each other)
    rows = [([5, 17, 40, 8, 9, 61], 4), ([70, 12, 33, 4, 90], 2), ([23, 81, 7, 54, 66, 31, 28, 19], 1)]

    def alone(ids: list[int], end: int = -1) -> list[int]:
        for _ in range(5):
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
            if ids[-1] == end:
                break
        return ids

    prompts = [rows[0][0][:4], rows[1][0][:2], rows[2][0][:4]]  # of a text without a prompt, the first half
    end = alone(prompts[0])[6]
    vocabulary = {f"<{i}>": i for i in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<3>")), eos_token=f"<{end}>"
    )
    found = continuations(model, Texts(rows, batch_size=3, pad=0, device="cpu"), tokenizer, new_tokens=5)
    assert sorted(found.rows) == sorted((alone(prompt, end), len(prompt)) for prompt in prompts)


def test_a_cache_from_outside_is_refused():
    base = make()
    cache = base(**inputs(), use_cache=True).past_key_values
    with oracle(base, tuned_blocks(base), ("block",)), pytest.raises(ValueError, match="has not seen"):
        base(**inputs(), past_key_values=cache)


def test_kl_is_the_plain_one():
    base, batch = make(), next(iter(random_texts()))
    tuned = tuned_blocks(base, std=0.3)
    distance, kl, same = Distance(), [], []
    with torch.no_grad():
        reference, found = tuned(**batch.inputs(tuned)).logits, base(**batch.inputs(base)).logits
    distance.add(batch, reference, found)
    for row, present in enumerate(batch.attention_mask.sum(1)):
        for t in range(1, present - 1):  # two tokens of prompt: the second predicts the answer's first
            p, q = (np.exp(x[row, t].double().numpy()) for x in (reference, found))
            p, q = p / p.sum(), q / q.sum()
            kl.append((p * np.log(p / q)).sum())
            same.append(p.argmax() == q.argmax())
    summary = distance.summary()
    assert summary["tokens_answer"] == len(kl)
    assert summary["tokens"] == batch.attention_mask.sum()
    np.testing.assert_allclose(summary["kl_answer"], np.mean(kl), rtol=1e-4)
    np.testing.assert_allclose(summary["agreement_answer"], np.mean(same))


def test_spectrum_is_the_plain_one():
    x = torch.randn(50, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) + 2
    moments = Moments(6)
    for part in x.split(7):
        moments.add(part)
    values = np.sort(np.linalg.eigvalsh(np.cov(x.numpy().T, bias=True)))[::-1]
    share = values / values.sum()
    expected = {
        "rms": np.sqrt((x.numpy() ** 2).sum(1).mean()),
        "constant": (x.numpy().mean(0) ** 2).sum() / (x.numpy() ** 2).sum(1).mean(),
        "effective_rank": np.exp(-(share * np.log(share)).sum()),
        "participation": values.sum() ** 2 / (values**2).sum(),
        "energy_2": share[:2].sum(),
    }
    found = spectrum(moments, (2,))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-9, err_msg=name)


def test_spectra_are_of_what_is_added_and_of_tokens_alone():
    base, texts = tuned_blocks(make(), std=0.1), random_texts()  # (in the small one blocks hardly read each other)
    tuned = with_adapter(base, "lora")
    found, spectra = measure(Pair(base, tuned, None), texts)
    spectra = spectra.set_index(["site", "block"])
    states, differences, steps, mlps, missed = [], [], [], [], []
    for ids, _ in texts.rows:  # each row by itself: no padding
        with record(base, ("block",)) as ours, record(tuned, ("block",)) as theirs, torch.no_grad():
            base(input_ids=torch.tensor([ids])), tuned(input_ids=torch.tensor([ids]))
            states.append(ours["block", 1][0])
            differences.append((theirs["block", 1] - ours["block", 1])[0])
            angles = base.model.rotary_emb(theirs["block", 0], torch.arange(len(ids))[None])
            h = base.model.layers[1](theirs["block", 0], position_embeddings=angles, attention_mask=None)
            steps.append((theirs["block", 1] - h)[0])
            last = theirs["block", 2] - ours["block", 2]
        with oracle(base, tuned, ("mlp",)), record(base, ("block",)) as ours, torch.no_grad():
            base(input_ids=torch.tensor([ids]))
            missed.append(torch.stack([theirs["block", 2] - ours["block", 2], last])[:, 0])
        with record(base, ("mlp",)) as ours, record(tuned, ("mlp",)) as theirs, torch.no_grad():
            base(input_ids=torch.tensor([ids])), tuned(input_ids=torch.tensor([ids]))
            mlps.append((theirs["mlp", 0] - ours["mlp", 0])[0])
    steered, plain = torch.cat(missed, dim=1).double().square().sum((1, 2)).sqrt()
    np.testing.assert_allclose(found.set_index("site").loc["mlp", "final_error"], steered / plain, rtol=1e-4)
    relative = (torch.cat(differences).square().sum() / torch.cat(states).square().sum()).sqrt()
    np.testing.assert_allclose(spectra.loc[UNSTEERED, 1]["relative"], relative, rtol=1e-4)
    rms = torch.cat(mlps).double().square().sum(1).mean().sqrt()
    np.testing.assert_allclose(spectra.loc["mlp", 0]["rms"], rms, rtol=1e-5)
    for site, vectors in ((UNSTEERED, differences), ("block", steps)):
        x = torch.cat(vectors).double()
        np.testing.assert_allclose(spectra.loc[site, 1]["rms"], x.square().sum(1).mean().sqrt(), rtol=1e-5)
        share = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
        np.testing.assert_allclose(spectra.loc[site, 1]["energy_4"], share[:4].sum() / share.sum(), rtol=1e-5)


def test_the_command(tiny_llama, tmp_path, capsys):
    tuned = save_tuned(tiny_llama, tmp_path / "tuned", "lora")
    arguments = ["--base", tiny_llama, "--tuned", tuned, "--task", "listops_short", "--num-texts", "24"]
    arguments += ["--held-out", "4", "--new_tokens", "3", "--batch_size=6", "-o", str(tmp_path / "out")]
    assert peft_steer("analyze", "oracle", *arguments) == 0
    assert "attention+mlp" in capsys.readouterr().out
    result = json.loads((tmp_path / "out/oracle.json").read_text())
    assert result["same_generations"] == 1
    kl = {row["site"]: row["kl"] for row in result["rows"]}
    assert kl["block"] < 1e-6 < kl["none"]
    spectra = pd.read_csv(tmp_path / "out/spectra.csv")
    assert len(spectra) == 2 * 4  # blocks, and sites with the unsteered differences
    for name in ("oracle.png", "oracle.svg", "spectra.png", "spectra.svg"):
        assert (tmp_path / "out" / name).stat().st_size > 1000
    assert not list((tmp_path / "out").glob(".*"))
