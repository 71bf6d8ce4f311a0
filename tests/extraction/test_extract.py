"""`initialize_vectors` and `peft-steer extract`, from the texts to the adapter."""

import json

import pytest
import torch
from command_line import peft_steer
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_steer import SteerConfig
from peft_steer.extraction import initialize_vectors


POSITIVE = ["yes, good", "fine!", "I do like it a lot", "well done"]
NEGATIVE = ["no, bad", "awful!", "I do hate it", "badly done now"]


@pytest.fixture
def tokenizer(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama)


def base(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


def states_of(model, tokenizer, text, block):
    """`output_hidden_states` of one text alone, `(tokens, d)`, at a block's output before the final norm."""
    kept = []
    handle = model.model.layers[block].register_forward_hook(lambda module, args, out: kept.append(out))
    with torch.no_grad():
        model(tokenizer(text, return_tensors="pt").input_ids)
    handle.remove()
    return kept[0][0]


@pytest.mark.parametrize("tokens", ["last", "mean"])
def test_the_vector_is_the_mean_difference(tokens, tiny_llama, tokenizer):
    model = get_peft_model(base(tiny_llama), SteerConfig(kind="vector", task_type="CAUSAL_LM"))
    initialize_vectors(model, POSITIVE, NEGATIVE, tokenizer, tokens=tokens, batch_size=3)
    plain = base(tiny_llama)
    for block in range(2):

        def read(text, block=block):
            h = states_of(plain, tokenizer, text, block)
            return h[-1] if tokens == "last" else h.mean(0)

        expected = sum(read(p) - read(n) for p, n in zip(POSITIVE, NEGATIVE, strict=True)) / len(POSITIVE)
        v = model.get_base_model().model.layers[block].steering.steer_edit["default"].v
        torch.testing.assert_close(v.detach(), expected, atol=1e-5, rtol=0)
        assert expected.norm() > 0.1


@pytest.mark.parametrize("site", ["block", "mlp", "attention", "heads", ["block", "heads"]], ids=str)
def test_every_site_and_a_saved_adapter(site, tiny_llama, tokenizer, tmp_path):
    config = SteerConfig(kind="vector", site=site, layers_to_transform=[1], task_type="CAUSAL_LM")
    model = get_peft_model(base(tiny_llama), config)
    ids = torch.arange(3, 20)[None]
    initialize_vectors(model, POSITIVE, NEGATIVE, tokenizer, method="pca_uncentred", norm="states")
    with torch.no_grad():
        steered = model(ids).logits
        assert (steered - base(tiny_llama)(ids).logits).abs().max() > 0.1
        model.save_pretrained(tmp_path)
        assert torch.equal(PeftModel.from_pretrained(base(tiny_llama), tmp_path).eval()(ids).logits, steered)
    assert all(p.requires_grad for name, p in model.named_parameters() if "steer" in name)  # it can be trained further


def test_an_adapter_that_acts_already_does_not_change_the_states(tiny_llama, tokenizer):
    model = get_peft_model(base(tiny_llama), SteerConfig(kind="vector", task_type="CAUSAL_LM"))
    initialize_vectors(model, POSITIVE, NEGATIVE, tokenizer)
    first = {name: x.clone() for name, x in model.named_parameters() if "steer" in name}
    model.train()
    initialize_vectors(model, POSITIVE, NEGATIVE, tokenizer)
    assert all(torch.equal(x, first[name]) for name, x in model.named_parameters() if "steer" in name)
    assert model.training


def test_the_start_of_a_training(tiny_llama, tokenizer):
    """Training goes on from the vector: the first loss is the base's with it added, and steps lower it."""
    config = SteerConfig(kind="vector", layers_to_transform=[1], task_type="CAUSAL_LM")
    model = get_peft_model(base(tiny_llama), config)
    initialize_vectors(model, POSITIVE, NEGATIVE, tokenizer)
    v = model.get_base_model().model.layers[1].steering.steer_edit["default"].v
    start, plain = v.detach().clone(), base(tiny_llama)
    plain.model.layers[1].register_forward_hook(lambda module, args, out: out + start)
    ids = tokenizer(POSITIVE[2], return_tensors="pt").input_ids
    optimizer, losses = torch.optim.AdamW([v], lr=0.05, weight_decay=0.0), []
    for _ in range(8):
        loss = model.train()(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] == pytest.approx(plain(input_ids=ids, labels=ids).loss.item(), abs=1e-5)
    assert losses[-1] < losses[0]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.model.layers.1.steering.steer_edit.default.v"
    ]


@pytest.mark.parametrize(
    ("config", "texts", "kwargs", "message"),
    [
        ({"kind": "linear"}, (POSITIVE, NEGATIVE), {}, "has no vectors to set"),
        ({"kind": "vector"}, (POSITIVE, NEGATIVE[:2]), {}, "not 4 and 2"),
        ({"kind": "vector"}, (POSITIVE, POSITIVE), {}, "do not differ"),
        ({"kind": "vector"}, (POSITIVE, NEGATIVE), {"tokens": "first"}, "'first' must be one of"),
        ({"kind": "vector"}, (POSITIVE, NEGATIVE), {"norm": "big"}, "'big' must be one of"),
    ],
)
def test_refused(config, texts, kwargs, message, tiny_llama, tokenizer):
    model = get_peft_model(base(tiny_llama), SteerConfig(task_type="CAUSAL_LM", **config))
    with pytest.raises(ValueError, match=message):
        initialize_vectors(model, *texts, tokenizer, **kwargs)


@pytest.fixture
def pairs(tmp_path):
    rows = [{"prompt": f"Case {i} is", "positive": f" a{i} fine", "negative": f" b{i} poor"} for i in range(16)]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    return str(tmp_path / "pairs.json")


def test_command(pairs, tiny_llama, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--model", tiny_llama, "--pairs", pairs, "--layers", "1", "-o", str(out), "--scale", "0.5"]
    assert peft_steer("extract", *flags, "--scales", "-4", "0", "4") == 0
    facts = json.loads((out / "extract.json").read_text())
    assert facts["pairs"] == {"used": 12, "held_out": 4}
    assert [block["block"] for block in facts["blocks"]] == [1]
    down, zero, up = facts["effects"]
    assert zero["kl"] == zero["shift"] == 0
    assert up["shift"] == pytest.approx(up["log_odds"] - zero["log_odds"], abs=1e-6)
    assert abs(up["shift"]) > 0.1
    assert down["kl"] > 0.01
    printed = capsys.readouterr().out
    assert f"{up['shift']:.3f} ± {up['shift_stderr']:.3f}" in printed
    model = PeftModel.from_pretrained(base(tiny_llama), out)
    assert model.peft_config["default"].scale == 0.5
    assert model.peft_config["default"].layers_to_transform == [1]


def test_a_task_chooses_the_strength(pairs, tiny_llama, tokenizer, tmp_path, capsys):
    """The best score, of equals the weakest strength; the saved adapter has that score."""
    from peft_steer.evaluation.lm import PeftSteerLM
    from peft_steer.evaluation.scoring import score
    from peft_steer.evaluation.tasks import evaluate_on, load_task

    out, limit = tmp_path / "out", 12
    flags = ["--model", tiny_llama, "--pairs", pairs, "--norm", "states", "-o", str(out)]
    assert (
        peft_steer(
            "extract", *flags, "--task", "listops_short", "--limit", str(limit), "--scales", "-3", "-1", "0", "1"
        )
        == 0
    )
    facts = json.loads((out / "extract.json").read_text())
    scores = {effect["scale"]: effect["score"] for effect in facts["effects"]}
    assert len(set(scores.values())) > 1
    chosen = min((s for s in scores if scores[s] == max(scores.values())), key=abs)
    assert facts["scale"] == chosen
    assert f"Strength {chosen:g}: the best acc" in capsys.readouterr().out
    model = PeftModel.from_pretrained(base(tiny_llama), out).eval()
    assert model.peft_config["default"].scale == chosen
    task, _ = load_task("listops_short")
    evaluate_on(task, "validation")
    assert score(PeftSteerLM(pretrained=model, tokenizer=tokenizer), task, limit)["score"] == scores[chosen]


def test_log_odds_are_those_of_the_answers(pairs, tiny_llama, tokenizer, tmp_path):
    """`log p(positive | prompt) - log p(negative | prompt)`, written out, of the held-out pairs."""
    from peft_steer.extraction.effect import effects
    from peft_steer.extraction.pairs import load_rows, pair_of

    model = get_peft_model(base(tiny_llama), SteerConfig(kind="vector", task_type="CAUSAL_LM"))
    initialize_vectors(model, POSITIVE, NEGATIVE, tokenizer)
    rows = load_rows(pairs)[:3]
    found = effects(model, [2.0], [pair_of(row, tokenizer) for row in rows], tokenizer)[0]
    model.base_model.set_scale("default", 2.0)

    def log_p(prompt, answer):
        n, ids = len(tokenizer(prompt).input_ids), tokenizer(prompt + answer, return_tensors="pt").input_ids
        with torch.no_grad():
            log_probs = model(ids).logits[0].log_softmax(-1)
        return sum(log_probs[i - 1, ids[0, i]].item() for i in range(n, ids.shape[1]))

    odds = [log_p(row["prompt"], row["positive"]) - log_p(row["prompt"], row["negative"]) for row in rows]
    assert found.log_odds == pytest.approx(sum(odds) / 3, abs=1e-4)


def test_system_prompts(tiny_llama, tmp_path):
    """The state is read where the answer would begin; the span is what both prompts have in common there."""
    from peft_steer.extraction.pairs import pair_of_systems

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    pair = pair_of_systems("How?", ("Be kind.", "Be rude and short."), tokenizer)
    texts = {tokenizer.decode(text.ids[text.start :]) for text in (pair.positive, pair.negative)}
    assert texts == {".\n[user] How?\n[assistant]"}
    assert tokenizer.decode(pair.positive.ids).startswith("[system] Be kind.")
    assert not pair.has_prompt


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give either --pairs"),
        (["--pairs", "PAIRS", "--questions", "x"], "give either --pairs"),
        (["--questions", "x"], "--positive-system is missing"),
        (["--pairs", "missing.json"], "there is no file 'missing.json'"),
        (["--pairs", "PAIRS", "--model", "no/such-model"], "--model: 'no/such-model' cannot be loaded"),
        (["--pairs", "PAIRS", "--positive-column", "good"], "no column 'good'; there are"),
        (["--pairs", "PAIRS", "--held-out", "0.1"], "2 would be held out"),
        (["--pairs", "PAIRS", "--held-out", "1"], "--held-out is 1.0"),
        (["--pairs", "PAIRS", "--limit", "5"], "with --task"),
        (["--pairs", "PAIRS", "--task", "listops", "--scale", "2"], "left to --task"),
        (["--pairs", "PAIRS", "--layers", "7"], "asks for [7]"),
        (["--pairs", "PAIRS", "--task", "no_such_task"], "no_such_task"),
        (
            ["--positive-system", "a", "--negative-system", "b", "--questions", "q", "--split", "test"],
            "--split is for --pairs",
        ),
    ],
)
def test_command_refuses(flags, message, pairs, tiny_llama, tmp_path, capsys):
    flags = [pairs if word == "PAIRS" else word for word in flags]
    assert peft_steer("extract", "--model", tiny_llama, "-o", tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
