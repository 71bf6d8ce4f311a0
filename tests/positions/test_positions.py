"""Which tokens are steered: the mask of every kind of forward pass, against plainly written expectations."""

import pytest
import torch
from positions_reference import GREEDY, SPECS, expected, mask_of, steered, tokens
from tiny import HEAD_KINDS, METHODS, SITES, VOCAB, reference_delta, steer_layers
from transformers import DynamicCache, StaticCache

from peft_steer import steered_positions


DECODERS = ("llama", "gpt2", "gemma3")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", ["labels", "completion_mask", "prompt_lengths"])
@pytest.mark.parametrize("spec", [*SPECS, "f20+l20"])
def test_the_mask_of_a_padded_batch(spec, how, side):
    """Prompts of 1, 13, 4 tokens; ReFT's rule caps each end at half of the prompt (13 tokens with f7+l7 leave the
    seventh alone)."""
    lengths, prompts = (5, 16, 4), (1, 13, 4)
    ids, mask = tokens(*lengths, side=side)
    completion = torch.zeros_like(mask)
    want = torch.zeros_like(mask, dtype=torch.bool)
    for row, (n, p) in enumerate(zip(lengths, prompts, strict=True)):
        start = 0 if side == "right" else 16 - n
        completion[row, start + p : start + n] = 1
        want[row, start : start + n] = torch.tensor(expected(spec, p, n))
    given = {
        "labels": {"labels": ids.masked_fill(completion == 0, -100)},
        "completion_mask": {"completion_mask": completion},
        "prompt_lengths": {"prompt_lengths": torch.tensor(prompts)},
    }[how]
    model = steered(positions=spec)
    model(input_ids=ids, attention_mask=mask, **given)
    assert torch.equal(mask_of(model), want)


EDITS = [
    (m, {"site": s}) for m in METHODS for s in [*SITES, ["attention", "mlp"]] if (m, s) != ("joint", "heads")
]  # (it refuses that)
EDITS += [("steer", config) for config in HEAD_KINDS.values()]


@pytest.mark.parametrize(("method", "config"), EDITS)
def test_the_edit_is_the_equation_at_the_mask_and_nothing_elsewhere(method, config):
    model = steered(**config, positions="f2+l1", method=method)
    ids, mask = tokens(9, 6)
    seen = {}

    def record(layer, args, output):
        seen[layer] = (args[0], output)

    for layer in steer_layers(model).values():
        layer.register_forward_hook(record)
    model(input_ids=ids, attention_mask=mask, prompt_lengths=[7, 5])
    chosen = torch.zeros_like(mask, dtype=torch.bool)
    chosen[0, [0, 1, 6]] = chosen[1, [0, 1, 4]] = True
    assert len(seen) == 3 * (len(config["site"]) if isinstance(config["site"], list) else 1)
    for layer, (h, out) in seen.items():
        assert torch.equal(out[~chosen], h[~chosen])
        edit = layer.steer_edit["default"]
        if method == "steer":
            torch.testing.assert_close(
                (out - h)[chosen].double(), reference_delta(edit, h)[chosen], rtol=1e-3, atol=1e-5
            )
        assert not torch.equal(out[chosen], h[chosen])


@pytest.mark.parametrize("kind", ["vector", "linear", "nonlinear", "loreft"])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients(kind, compiled, monkeypatch):
    """Those of `where(mask, h + dh, h)`, computed by autograd, in both of the ways in which it is computed."""
    layer = next(iter(steer_layers(steered(kind=kind, positions="prompt")).values()))
    edit = layer.steer_edit["default"]
    mask = torch.tensor([[True, False, True, True], [False, False, False, True]])
    h = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    edit.double().requires_grad_(True)
    weight = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(1)).double()
    inputs = (h, *edit.parameters())
    plain = torch.where(mask[..., None], h + edit.delta(h), h)
    want = torch.autograd.grad((plain * weight).sum(), inputs)

    class Fixed:
        def mask(self, positions):
            return mask

        def rows(self, positions):
            return mask.flatten().nonzero().flatten()

    layer.selection = Fixed()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    out = layer(h)
    assert torch.equal(out[~mask], h[~mask])
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(torch.autograd.grad((out * weight).sum(), inputs), want)


# --- packing: several sequences in one row, told apart by `position_ids`


@pytest.mark.parametrize("how", ["labels", "prompt_lengths"])
@pytest.mark.parametrize("spec", SPECS)
def test_packed_sequences(spec, how):
    """As TRL's collator writes them: no attention mask, the first label of each sequence masked, padded to a multiple
    by tokens whose position is 0."""
    lengths, prompts, padding = (6, 9, 4), (4, 3, 2), 2
    position_ids = torch.cat([torch.arange(n) for n in lengths] + [torch.zeros(padding, dtype=torch.long)])[None]
    ids = torch.randint(3, VOCAB - 1, position_ids.shape, generator=torch.Generator().manual_seed(0))
    labels = torch.cat(
        [torch.arange(n) - p for n, p in zip(lengths, prompts, strict=True)] + [torch.full((padding,), -1)]
    )[None]
    labels = torch.where(labels >= 0, ids, -100)
    given = {"labels": labels} if how == "labels" else {"prompt_lengths": torch.tensor([*prompts, 0, 0])}
    model = steered(positions=spec)
    model(input_ids=ids, position_ids=position_ids, **given)
    want = [x for n, p in zip(lengths, prompts, strict=True) for x in expected(spec, p, n)]
    tail = spec == "completion" and how == "prompt_lengths"  # said to be sequences, without a prompt
    assert mask_of(model)[0].tolist() == want + [tail] * padding


def test_packed_text_without_prompts():
    """Collators mask the first label of each packed sequence, which is no sign of a prompt of one token."""
    ids = torch.randint(3, VOCAB - 1, (1, 8), generator=torch.Generator().manual_seed(0))
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    with pytest.raises(ValueError, match="no sequence of this batch has a prompt"):
        steered(positions="last")(
            input_ids=ids, position_ids=position_ids, labels=ids.masked_fill(position_ids == 0, -100)
        )


def test_packed_rows_equal_single_sequences():
    """Two rows, each packed: its sequences are steered as each alone."""
    model = steered(positions="f1+l2")
    ids = torch.randint(3, VOCAB - 1, (2, 12), generator=torch.Generator().manual_seed(0))
    position_ids = torch.tensor([[*range(7), *range(5)], [*range(4), *range(8)]])
    labels = ids.clone()
    labels[0, :5] = labels[0, 7:9] = labels[1, :2] = labels[1, 4:10] = -100
    model(input_ids=ids, position_ids=position_ids, labels=labels)
    found = mask_of(model)
    for row, start, stop in ((0, 0, 7), (0, 7, 12), (1, 0, 4), (1, 4, 12)):
        part = (slice(row, row + 1), slice(start, stop))
        model(input_ids=ids[part], labels=labels[part])
        assert torch.equal(mask_of(model), found[part])


# --- generation


LOGITS = {"return_dict_in_generate": True, "output_logits": True}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", [*SPECS, "all"])
@pytest.mark.parametrize("architecture", DECODERS)
def test_left_padded_batches_generate_what_single_rows_do(architecture, spec, method):
    model = steered(architecture, method, positions=spec)
    lengths = (3, 9, 16)
    ids, mask = tokens(*lengths, side="left")
    counts = []
    model.get_base_model().register_forward_hook(lambda m, args, out: counts.append(steered_positions(m)))
    together = model.generate(input_ids=ids, attention_mask=mask, **GREEDY, **LOGITS)
    if spec != "all":
        in_prompt = sum(sum(expected(spec, n, n)) for n in lengths)
        assert counts == [in_prompt] + [3 * (spec == "completion")] * 4
    slow = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **GREEDY)
    assert torch.equal(slow, together.sequences)
    if spec != "all":
        assert counts[5:] == [in_prompt + 3 * i * (spec == "completion") for i in range(5)]
    with model.disable_adapter():
        assert not torch.equal(
            model.generate(input_ids=ids, attention_mask=mask, **GREEDY, **LOGITS).logits[-1], together.logits[-1]
        )
    for row, n in enumerate(lengths):
        alone = model.generate(
            input_ids=ids[row : row + 1, -n:], attention_mask=mask[row : row + 1, -n:], **GREEDY, **LOGITS
        )
        assert torch.equal(alone.sequences[0, n:], together.sequences[row, 16:])
        for single, batched in zip(alone.logits, together.logits, strict=True):
            torch.testing.assert_close(single[0], batched[row], rtol=1e-3, atol=1e-3)


WAYS = {
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "returned sequences": {"do_sample": True, "num_return_sequences": 2},
    "chunked prefill": {"prefill_chunk_size": 4},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill of a static cache": {"cache_implementation": "static", "prefill_chunk_size": 4},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spec", SPECS)
def test_ways_to_generate(spec, way):
    """Each equals generation without a cache, in which every step sees the whole sequence."""
    model = steered(positions=spec)
    ids, mask = tokens(*((16,) if way == "prompt lookup" else (5, 16)), side="left")
    options = {**GREEDY, **WAYS[way], "input_ids": ids, "attention_mask": mask}
    torch.manual_seed(0)
    found = model.generate(**options)
    reference = {k: v for k, v in options.items() if k not in ("prefill_chunk_size", "cache_implementation")}
    reference.pop("prompt_lookup_num_tokens", None)
    torch.manual_seed(0)
    assert torch.equal(found, model.generate(**reference, use_cache=False))


@pytest.mark.parametrize("spec", SPECS)
def test_generation_from_embeddings_and_without_a_mask(spec):
    model = steered(positions=spec)
    ids, mask = tokens(5, 16, side="left")
    want = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY), want)  # the padding token shows the padding
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY), want[:, 16:])


@pytest.mark.parametrize("spec", ["f3+l2", "prompt", "completion"])
def test_a_later_turn_with_the_cache_of_the_first(spec):
    """Given the whole conversation and the cache of its beginning, what is new of it is the prompt's end."""
    model = steered(positions=spec)
    ids, mask = tokens(12)
    first = model.generate(input_ids=ids[:, :8], attention_mask=mask[:, :8], return_dict_in_generate=True, **GREEDY)
    conversation = torch.cat([first.sequences, ids[:, 8:]], 1)
    counts = []
    model.get_base_model().register_forward_hook(lambda m, args, out: counts.append(steered_positions(m)))
    model.generate(input_ids=conversation, past_key_values=first.past_key_values, **GREEDY)
    seen = conversation.shape[1] - 12  # the last generated token is not in the cache
    assert counts[0] == sum(expected(spec, conversation.shape[1], conversation.shape[1])[12:])
    assert seen == 5


def test_a_cached_loop_by_hand():
    model = steered(positions="f2+l2")
    ids, mask = tokens(12, 7)
    model(input_ids=ids, attention_mask=mask, prompt_lengths=[6, 5])
    whole = mask_of(model)
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=16)):
        out = model(input_ids=ids[:, :5], attention_mask=mask[:, :5], prompt_lengths=[6, 5], past_key_values=cache)
        parts = [mask_of(model)]
        for i in (5, 9):
            out = model(
                input_ids=ids[:, i : i + 4][:, : 12 - i],
                attention_mask=mask[:, : i + 4],
                prompt_lengths=[6, 5],
                past_key_values=out.past_key_values,
            )
            parts.append(mask_of(model))
        assert torch.equal(torch.cat(parts, 1), whole)
