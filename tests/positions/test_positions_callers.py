"""Positions whoever calls the model: caches of other kinds, trainers that take the labels, adapters on adapters."""

import pytest
import torch
import transformers as tf
from peft import LoraConfig, TaskType, get_peft_model
from positions_batch import batch, tokens_of_a_prompt
from positions_reference import GREEDY, mask_of, tokens
from sft import losses, sft_trainer
from tiny import METHODS, MOE, SMALL, inputs, make, randomize, steer_layers

from peft_steer import MarkCompletions, SteerConfig
from peft_steer.analysis.capture.steering import oracle
from peft_steer.positions.layout import cached_length
from peft_steer.positions.spec import Layout, select


LINEAR_ATTENTION = {
    "minimax": lambda layers: tf.MiniMaxForCausalLM(
        tf.MiniMaxConfig(
            **SMALL,
            **MOE,
            num_local_experts=2,
            layer_types=[{"l": "linear_attention", "f": "full_attention"}[x] for x in layers],
            block_size=4,
        )
    ),
    "qwen3_next": lambda layers: tf.Qwen3NextForCausalLM(
        tf.Qwen3NextConfig(
            **SMALL,
            **MOE,
            num_experts=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            layer_types=[{"l": "linear_attention", "f": "full_attention"}[x] for x in layers],
        )
    ),
}


def hybrid(architecture, layers):
    torch.manual_seed(0)
    return LINEAR_ATTENTION[architecture](layers).eval().requires_grad_(False)


@pytest.mark.parametrize("layers", ["lfl", "llf", "ffl"])
@pytest.mark.parametrize("architecture", LINEAR_ATTENTION)
@pytest.mark.parametrize("spec", ["f1+l1", "prompt", "completion"])
def test_linear_attention(architecture, layers, spec):
    """A cache whose first layers have no length: cached generation gives the logits of uncached."""
    model = get_peft_model(hybrid(architecture, layers), SteerConfig(r=4, kind="nonlinear", positions=spec))
    randomize(model, std=0.5)
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    ids = tokens(6)[0]
    cached, whole = (model.eval().generate(input_ids=ids, use_cache=c, **options) for c in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), rtol=1e-3, atol=1e-4)


def test_a_cache_that_knows_no_length():
    cache = tf.DynamicCache(config=tf.Qwen3NextConfig(**{**SMALL, "layer_types": ["linear_attention"] * 3}))
    with pytest.raises(ValueError, match="does not know how many tokens"):
        cached_length(cache)


@pytest.mark.parametrize("layers", ["lfl", "ffl"])
def test_the_oracle_on_linear_attention(layers):
    """It goes on from no cache that it has not seen, whichever layers that has filled."""
    base, tuned = hybrid("minimax", layers), hybrid("minimax", layers)
    ids = tokens(6)[0]
    with torch.no_grad():
        cache = base(input_ids=ids, use_cache=True).past_key_values
        with oracle(base, tuned, ["block"]), pytest.raises(ValueError, match="a cache that it has not seen"):
            base(input_ids=ids[:, :1], past_key_values=cache)


# --- trainers that take the labels


def custom_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)


@pytest.mark.parametrize("how", ["label_smoothing_factor", "compute_loss_func"])
def test_trainers_that_take_the_labels(tiny_llama, tmp_path, how):
    """Refused with the remedy; with it, the same tokens are edited, and the same is learnt."""

    def trainer(folder, with_loss):
        options = {"label_smoothing_factor": 0.1} if with_loss and how == "label_smoothing_factor" else {}
        extra = {"compute_loss_func": custom_loss} if with_loss and how == "compute_loss_func" else {}
        return sft_trainer(
            tf.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="float32"),
            tiny_llama,
            tmp_path / folder,
            SteerConfig(r=4, kind="linear", positions="f1+l1", task_type="CAUSAL_LM"),
            trainer_options=extra,
            max_steps=3,
            save_strategy="no",
            **options,
        )

    refused = trainer("refused", True)
    with pytest.raises(ValueError, match=r"data_collator=peft_steer\.MarkCompletions"):
        refused.train()

    masks = []
    for marked in (False, True):
        run = trainer(str(marked), marked)
        if marked:
            run.data_collator = MarkCompletions(run.data_collator)
        seen = []
        layer = next(iter(steer_layers(run.model).values()))
        layer.register_forward_hook(lambda m, args, out, seen=seen: seen.append(m.steered))
        run.train()
        masks.append(seen[:: len(seen) // 3])  # TRL runs the model twice where it computes the loss itself
        assert len(losses(run)) == 3
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*masks, strict=True))


# --- adapters on adapters


@pytest.mark.parametrize("outer", METHODS)
@pytest.mark.parametrize("spec", ["f1+l1", "completion"])
def test_on_top_of_lora(outer, spec):
    """`generate` of the outermost model reaches the base's; the tokens that are edited are those without LoRA."""
    lora = get_peft_model(make(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    config = METHODS[outer](r=4, kind="nonlinear", positions=spec, task_type="CAUSAL_LM")
    model = get_peft_model(lora, config, adapter_name="outer")
    alone = get_peft_model(make(), config)
    for m in (model, alone):
        randomize(m, std=0.0)
        with torch.no_grad():
            for name, p in m.named_parameters():
                if "steering." in name:
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        m.eval()
    x = batch()
    torch.testing.assert_close(model(**x).logits, alone(**x).logits)
    masks = [next(iter(steer_layers(m).values())).steered for m in (model, alone)]
    assert torch.equal(*masks)
    assert masks[0].any()
    prompt = tokens_of_a_prompt()
    assert torch.equal(model.generate(**prompt, **GREEDY), alone.generate(**prompt, **GREEDY))
    assert not torch.equal(model.generate(**prompt, **GREEDY), make().generate(**prompt, **GREEDY))


# --- models without a completion


@pytest.mark.parametrize("task_type", [TaskType.SEQ_CLS, TaskType.TOKEN_CLS, None])
@pytest.mark.parametrize("method", METHODS)
def test_completions_of_a_classifier_are_refused(method, task_type):
    cls = tf.LlamaForTokenClassification if task_type == TaskType.TOKEN_CLS else tf.LlamaForSequenceClassification
    base = cls(tf.LlamaConfig(**SMALL, num_labels=2))
    with pytest.raises(ValueError, match=r"positions='completion'` has no token in .*does not generate"):
        get_peft_model(base, METHODS[method](positions="completion", task_type=task_type))
    model = get_peft_model(base, METHODS[method](positions="last"))
    model(**inputs())
    assert mask_of(model).any()


def test_selecting_all_tokens():
    index = torch.arange(4).expand(2, 4)
    layout = Layout(index, torch.full((2, 4), 2), index > 0)
    assert torch.equal(select("all", layout), torch.ones(2, 4, dtype=torch.bool))
