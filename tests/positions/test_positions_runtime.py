"""Positions under whatever runs a model: checkpointing, compilation, copies; what they cost in memory and time."""

import copy
import io
import pickle

import pytest
import torch
import transformers as tf
from positions_batch import batch, tokens_of_a_prompt
from positions_reference import GREEDY, steered, tokens
from tiny import (
    SITES,
    randomize,
)
from torch.profiler import profile
from training import gradients

from peft_steer import steered_positions
from peft_steer.cost import saved_bytes


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradient_checkpointing_recomputes_with_the_positions_of_its_own_pass(architecture, site, reentrant):
    """Two passes with other prompts, then one backward; as contrastive losses have it."""
    one, two = batch(), batch(prompts=(2, 3), seed=1)
    found = []
    for checkpointing in (False, True):
        model = steered(architecture, site=site, positions="f2+l1").train()
        model.get_base_model().eval().train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        loss = model(**one).loss + model(**two).loss
        model(**batch(prompts=(1, 1), seed=2))
        loss.backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert all(g.abs().sum() > 0 for g in found[0].values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compile_without_graph_breaks(checkpointing):
    model = steered(site="mlp", positions="f2+l1").train(checkpointing)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()  # which a compiled graph cannot return, for any adapter
        model.config.use_cache = False  # as trainers set it
    x = batch()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for m in (model, compiled):
        model.zero_grad()
        out = m(**x)
        out.loss.backward()
        found.append((out.logits.detach(), gradients(model)))
    torch.testing.assert_close(found[1], found[0])
    compiled(**batch(prompts=(2, 3)))  # the mask is no constant of the graph
    torch.testing.assert_close(compiled(**batch(prompts=(2, 3))).logits, model(**batch(prompts=(2, 3))).logits)
    with pytest.raises((ValueError, RuntimeError), match="no sequence of this batch has a prompt"):
        compiled(**batch(prompts=(0, 0)))


def test_compiled_generation():
    """Static cache and compiled decoding steps, as transformers does it by itself on accelerators."""
    model = steered(positions="completion")
    ids, mask = tokens(5, 8, side="left")
    want = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    torch._dynamo.reset()
    config = tf.CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    found = model.generate(
        input_ids=ids, attention_mask=mask, cache_implementation="static", compile_config=config, **GREEDY
    )
    assert torch.equal(found, want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_copies_and_pickles():
    model = steered(positions="f2+l1")
    want = model.generate(**tokens_of_a_prompt(), **GREEDY)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(other.generate(**tokens_of_a_prompt(), **GREEDY), want)
        randomize(other, std=1.0, seed=5)
        other.get_base_model().lm_head.weight.data.neg_()  # a copy refers to nothing of the original
        assert not torch.equal(other.generate(**tokens_of_a_prompt(), **GREEDY), want)
        assert torch.equal(model.generate(**tokens_of_a_prompt(), **GREEDY), want)


@pytest.mark.parametrize("kind", ["vector", "nonlinear"])
def test_memory_is_that_of_the_chosen_tokens(kind):
    """Kept for backward, beside what the model keeps for an edit of every token: the states of the chosen ones."""
    x = batch((16, 16, 16, 16), (8, 8, 8, 8))
    d, layers, share = 32 * 4, 3, {"last": 4, "f1+l2": 12, "prompt": 32}
    every = saved_bytes(steered(kind=kind).train(), x)
    for spec, rows in share.items():
        extra = saved_bytes(steered(kind=kind, positions=spec).train(), x) - every
        assert extra <= layers * rows * d + 2048, spec


def test_no_search_and_no_mask_at_every_layer(monkeypatch):
    """A pass goes through neither all modules nor, for a count that nobody asks for, a mask for each layer."""
    model = steered(positions="f2+l1").get_base_model()
    x = batch()
    model(**x)
    names = ("modules", "named_modules", "children", "named_children")
    for name in names:
        monkeypatch.setattr(torch.nn.Module, name, lambda self, *args, name=name, **kwargs: pytest.fail(name))
    with profile() as events:
        model(**x)
    monkeypatch.undo()
    made = [e.name for e in events.events() if e.name in ("aten::zeros", "aten::bitwise_or", "aten::full")]
    assert len(made) < len(model.model.layers), made
    assert steered_positions(model) == 6
