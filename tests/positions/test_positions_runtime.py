"""Positions under everything that runs a model: checkpointing, compilation, copies, several adapters, other model
classes, merging."""

import copy
import io
import pickle

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from positions_batch import batch, tokens_of_a_prompt
from positions_reference import GREEDY, SPECS, expected, mask_of, steered, tokens
from tiny import (
    METHODS,
    SITES,
    SMALL,
    assert_equal_but_for_rounding,
    inputs,
    make,
    randomize,
    reference_delta,
    steer_layers,
)
from torch.profiler import profile

from peft_steer import SteerConfig, steered_positions
from peft_steer.cost import saved_bytes


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


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


def test_injected_without_a_peft_model():
    """transformers' own adapters, and PEFT's `inject_adapter_in_model`."""
    want = steered(positions="f2+l1").generate(**tokens_of_a_prompt(), **GREEDY)
    native = make()
    native.add_adapter(SteerConfig(r=4, kind="nonlinear", positions="f2+l1"))
    for model in (native, inject_adapter_in_model(SteerConfig(r=4, kind="nonlinear", positions="f2+l1"), make())):
        randomize(model, std=0.5)
        assert torch.equal(model.eval().generate(**tokens_of_a_prompt(), **GREEDY), want)
        model(**batch())
        assert steered_positions(model) == 6


def test_saved_and_loaded(tmp_path):
    model = steered(positions="f2+l1")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    assert_equal_but_for_rounding(loaded.eval()(**batch()).logits, model(**batch()).logits)
    assert torch.equal(mask_of(loaded), mask_of(model))


def test_several_adapters_with_other_positions():
    """Active together, each where it acts; rows of one batch with different ones."""
    model = steered(positions="f2")
    model.add_adapter("second", SteerConfig(kind="vector", positions="completion"))
    model.add_adapter("everywhere", SteerConfig(kind="vector"))
    randomize(model, std=0.5)
    x = batch()
    model.base_model.set_adapter(["default", "second"])
    seen = []
    layer = next(iter(steer_layers(model).values()))
    layer.register_forward_hook(lambda m, args, out: seen.extend((args[0], out)))
    model(**x)
    h, out = seen
    first, second = layer.steer_edit["default"], layer.steer_edit["second"]
    want = h.clone()
    f2 = torch.tensor([expected("f2", 5, 9), [*expected("f2", 4, 6), *[False] * 3]])
    rest = torch.tensor([expected("completion", 5, 9), [*expected("completion", 4, 6), *[False] * 3]])
    want[f2] += first.delta(h)[f2]
    want[rest] += second.v
    torch.testing.assert_close(out, want)
    assert steered_positions(model) == int((f2 | rest).sum()) == 4 + 6

    x = {**tokens_of_a_prompt()}
    names = ["default", "__base__", "second", "everywhere"]
    four = {name: value.repeat(2, 1) for name, value in x.items()}
    together = model.generate(**four, adapter_names=names, **GREEDY)
    for i, name in enumerate(names):
        row = {key: value[i : i + 1] for key, value in four.items()}
        assert torch.equal(model.generate(**row, adapter_names=[name], **GREEDY)[0], together[i])
    model.set_adapter("everywhere")
    model(**batch())
    assert steered_positions(model) == 18
    with model.disable_adapter():
        model(**batch())
        assert steered_positions(model) == 0


def test_with_a_lora_adapter_that_does_not_need_positions():
    """Where no adapter acts that needs to know the prompt, nothing has to be known."""
    model = steered(positions="last")
    with model.disable_adapter():
        want = make()(**inputs()).logits
        assert torch.equal(model(**inputs()).logits, want)
    mixed = model.generate(**tokens_of_a_prompt(), adapter_names=["__base__", "__base__"], **GREEDY)
    assert torch.equal(mixed, make().generate(**tokens_of_a_prompt(), **GREEDY))


# --- separate weights for the first and the last tokens


@pytest.mark.parametrize("kind", ["vector", "linear", "nonlinear", "loreft"])
def test_separate_weights(kind, tmp_path):
    """The first tokens have one edit, the last ones another; both are trained and saved."""
    model = steered(kind=kind, positions="f2+l1", share_weights=False)
    tied = steered(kind=kind, positions="f2+l1")
    assert model.get_nb_trainable_parameters()[0] == 2 * tied.get_nb_trainable_parameters()[0]
    seen = []
    layer = next(iter(steer_layers(model).values()))
    layer.register_forward_hook(lambda m, args, out: seen.extend((args[0], out)))
    model(**batch()).loss.backward()
    h, out = seen
    edits = layer.steer_edit["default"]
    for row, (first, last) in enumerate((([0, 1], [4]), ([0, 1], [3]))):
        rest = [i for i in range(9) if i not in first + last]
        assert torch.equal(out[row, rest], h[row, rest])
        for name, at in (("prefix", first), ("suffix", last)):
            want = reference_delta(edits[name], h[row, at])
            torch.testing.assert_close((out - h)[row, at].double(), want, rtol=1e-3, atol=1e-5)
    assert steered_positions(model) == 6
    for name, g in gradients(model).items():  # no completion depends on what the last block makes of the first tokens
        assert (g.abs().sum() > 0) != ("layers.2" in name and "prefix" in name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path, adapter_name="other").eval()
    assert_equal_but_for_rounding(loaded(**batch()).logits, model(**batch()).logits)
    native = make()
    native.load_adapter(str(tmp_path))
    assert_equal_but_for_rounding(native(**batch()).logits, model(**batch()).logits)
    assert torch.equal(
        loaded.generate(**tokens_of_a_prompt(), **GREEDY), model.generate(**tokens_of_a_prompt(), **GREEDY)
    )


@pytest.mark.parametrize("positions", ["all", "last", "f7", "prompt"])
def test_separate_weights_need_two_ends(positions):
    with pytest.raises(ValueError, match=r"`share_weights=False` contradicts `positions="):
        SteerConfig(positions=positions, share_weights=False)


# --- other classes of models


@pytest.mark.parametrize("spec", ["f2+l1", "last", "prompt"])
def test_classifiers_have_nothing_but_a_prompt(spec):
    ids, mask = tokens(9, 6)
    config = tf.LlamaConfig(**SMALL, num_labels=2)
    for base in (make("bert"), tf.LlamaForSequenceClassification(config).eval()):
        model = get_peft_model(base, SteerConfig(r=4, kind="nonlinear", positions=spec))
        model(input_ids=ids, attention_mask=mask)
        want = torch.zeros_like(mask, dtype=torch.bool)
        want[0], want[1, :6] = torch.tensor(expected(spec, 9, 9)), torch.tensor(expected(spec, 6, 6))
        assert torch.equal(mask_of(model), want)


@pytest.mark.parametrize("spec", ["f2+l1", "last", "prompt"])
def test_an_encoder_has_the_prompt(spec):
    model = steered("t5", positions=spec, target_modules=r"encoder\.block\.\d+")
    ids, mask = tokens(9, 6)
    model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :4])
    want = torch.zeros_like(mask, dtype=torch.bool)
    want[0], want[1, :6] = torch.tensor(expected(spec, 9, 9)), torch.tensor(expected(spec, 6, 6))
    assert torch.equal(mask_of(model), want)
    together = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    assert torch.equal(mask_of(model), want)
    for row, n in enumerate((9, 6)):
        assert torch.equal(model.generate(input_ids=ids[row : row + 1, :n], **GREEDY)[0], together[row])


def test_a_decoder_beside_an_encoder_has_the_completion():
    model = steered("t5", positions="completion", target_modules=r"decoder\.block\.\d+")
    ids, mask = tokens(9, 6)
    labels = torch.tensor([[5, 6, 7, 2], [5, 2, -100, -100]])
    model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    assert mask_of(model).tolist() == [[True] * 4, [True, True, False, False]]
    assert all(g.abs().sum() > 0 for g in gradients(model).values())
    cached = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **GREEDY), cached)
    assert steered_positions(model) == 2 * 5


# --- merging and unloading


@pytest.mark.parametrize("spec", SPECS)
def test_merging_is_refused(spec):
    model = steered(kind="vector", site="mlp", positions=spec)
    with pytest.raises(ValueError, match=r"positions=.* edits some tokens, a weight all of them"):
        model.merge_adapter()


def test_unloading_leaves_the_model_as_it_was():
    base = make()
    before = {name for m in base.modules() for name in vars(m)}
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in base.modules())
    model = get_peft_model(base, SteerConfig(positions="last")).unload()
    assert {name for m in model.modules() for name in vars(m)} == before
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()) == hooks
    assert model.generate.__func__ is type(model).generate


@pytest.mark.parametrize("kind", ["vector", "nonlinear"])
def test_memory_is_that_of_the_chosen_tokens(kind):
    """Kept for backward, beside what the model keeps for an edit of every token: the states of the chosen ones."""
    x = batch((16, 16, 16, 16), (8, 8, 8, 8))
    d, layers, share = 32 * 4, 3, {"last": 4, "f1+l2": 12, "prompt": 32}
    every = saved_bytes(steered(kind=kind).train(), x)
    for spec, rows in share.items():
        extra = saved_bytes(steered(kind=kind, positions=spec).train(), x) - every
        assert extra <= layers * rows * d + 2048, spec


# --- what a forward pass does beside the edits


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


@pytest.mark.parametrize("method", ["steer", "joint"])
def test_layers_that_come_and_go(method):
    """The list of layers that is kept follows copies, further adapters at other blocks, blocks that are copied into
    another model, and unloading."""
    ids = inputs()["input_ids"]
    model = steered(method=method, positions="last", layers_to_transform=[0])
    name = {"steer": "layers_to_transform", "joint": "steer_layers_to_transform"}[method]

    def masks(m):
        m(input_ids=ids, prompt_lengths=[3, 4])
        return {key: layer.steered.nonzero().tolist() for key, layer in steer_layers(m.get_base_model()).items()}

    last = [[0, 2], [1, 3]]
    assert masks(model) == {"model.layers.0": last}
    other = copy.deepcopy(model)
    config = METHODS[method](kind="nonlinear", r=4, positions="last", layers_to_transform=[2])
    assert getattr(config, name) == [2]
    other.add_adapter("more", config)
    other.base_model.set_adapter(["default", "more"])
    assert masks(other) == {"model.layers.0": last, "model.layers.2": last}
    assert masks(model) == {"model.layers.0": last}
    layers = model.get_base_model().model.layers
    masks(model)
    layers[1] = copy.deepcopy(layers[0])
    layers[1].self_attn.layer_idx = 1
    assert masks(model) == {"model.layers.0": last, "model.layers.1": last}
    bare = other.unload()
    assert not any("_kept_layers" in vars(m) for m in bare.modules())
    assert torch.equal(bare(input_ids=ids).logits, make()(input_ids=ids).logits)
