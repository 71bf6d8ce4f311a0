"""The tuners under the machinery that people run models with: compile, static caches, accelerate, continuous
batching, TRL."""

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import PeftModel, get_peft_model
from sft import losses, sft_trainer, sums
from tiny import (
    HEAD_KINDS,
    KINDS,
    METHODS,
    METHODS_AT_SITES,
    VOCAB,
    adapted,
    adapter_state,
    as_saved,
    inputs,
    logits,
    make,
    randomize,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig
from trl import DPOConfig, DPOTrainer

from peft_steer import SteerConfig


methods = pytest.mark.parametrize("method", METHODS)


@pytest.mark.parametrize(
    ("method", "kind", "site"),
    [
        ("steer", "silu", "block"),
        ("steer", "linear_bias", "block"),
        ("steer", "loreft", "mlp"),
        ("steer", "vector", "attention"),
        ("joint", "silu", "block"),
        ("steer", "linear", "heads"),
        ("steer", "lofit", "heads"),
        ("steer", "jola", "heads"),
    ],
)
def test_compile_without_graph_breaks(method, kind, site):
    model = adapted(method=method, **{"site": site, **(KINDS | HEAD_KINDS)[kind]})
    x = inputs()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for m in (model, compiled):
        model.zero_grad()
        out = m(**x).logits
        out.square().sum().backward()
        gradients.append((out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(("method", "site"), METHODS_AT_SITES)
def test_static_cache(method, site):
    model = adapted(method=method, site=site)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    x = {**inputs(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    assert torch.equal(model.generate(**x, cache_implementation="static", **options), model.generate(**x, **options))


@pytest.mark.parametrize(
    ("method", "site", "when"),  # PEFT 0.21's LoRA has no data in a model that is offloaded already
    [
        (m, site, when)
        for m, site in METHODS_AT_SITES
        for when in ("before", "after")
        if (m, when) != ("joint", "before")
    ],
)
def test_offloaded(method, site, when):
    """accelerate replaces every module's `forward`; between calls the weights, the adapter's too, lie on the meta
    device."""
    expected = logits(adapted(method=method, site=site))
    model = make()
    if when == "before":
        cpu_offload(model, execution_device=torch.device("cpu"))
    model = get_peft_model(model, METHODS[method](r=4, kind="nonlinear", site=site)).eval()
    randomize(model, std=0.5)
    if when == "after":
        cpu_offload(model.get_base_model(), execution_device=torch.device("cpu"))
        assert all(p.is_meta for p in model.parameters())
    assert next(model.get_base_model().model.layers[0].mlp.parameters()).is_meta
    assert torch.equal(logits(model), expected)


def test_loading_onto_an_offloaded_base(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    base = cpu_offload(make(), execution_device=torch.device("cpu"))
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded), logits(model))
        loaded.unload()


@methods
def test_several_active_adapters_on_an_offloaded_model(method):
    model = adapted(method=method)
    model.add_adapter("other", METHODS[method](kind="vector"))
    randomize(model, std=0.5)
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model)
    cpu_offload(model.get_base_model(), execution_device=torch.device("cpu"))
    assert torch.equal(logits(model), expected)


def test_lora_on_an_offloaded_base_is_an_error():
    """PEFT 0.21 leaves its weights without data."""
    model = cpu_offload(make(), execution_device=torch.device("cpu"))
    with pytest.raises(RuntimeError, match="Adapt the model first, then offload it"):
        get_peft_model(model, METHODS["joint"](r=4))(**inputs())


@methods
def test_device_map_at_loading(method, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "base")
    expected = as_saved(adapted(method=method))
    expected.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map={"": "cpu"})
    dispatch_model(loaded, device_map={"": "cpu"}, force_hooks=True)
    assert torch.equal(logits(PeftModel.from_pretrained(loaded, tmp_path / "adapter")), logits(expected))


@pytest.mark.slow
@methods
def test_continuous_batching(method):
    """Rows of different lengths in one flattened batch over a paged cache generate what each generates alone."""
    model = adapted(method=method, kind="linear")
    prompts = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": VOCAB, "pad_token_id": 0}
    together = model.get_base_model().generate_batch(
        inputs=prompts,
        generation_config=GenerationConfig(**options),
        # By default the cache takes 90 % of the machine's free memory.
        continuous_batching_config=ContinuousBatchingConfig(page_size=16, num_blocks=16, max_batch_tokens=64),
        warmup=False,
    )
    found = sorted(together.values(), key=lambda x: prompts.index(list(x.prompt_ids)))
    for prompt, output in zip(prompts, found, strict=True):
        alone = model.generate(input_ids=torch.tensor([prompt]), **options)[0, len(prompt) :]
        assert output.generated_tokens == alone.tolist()


# --- TRL's trainers, unchanged


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype="float32")


@pytest.mark.parametrize("kind", ["vector", "linear_bias", "silu", "loreft", "noreft", "direft", "nodireft"])
def test_sft_and_resume(tmp_path, tiny_llama, kind):
    """An interrupted run that is resumed ends with the same adapter, bit for bit; the file holds it."""
    config = {"r": 4, "task_type": "CAUSAL_LM", **KINDS[kind]}
    base = load(tiny_llama).state_dict()
    whole = sft_trainer(load(tiny_llama), tiny_llama, tmp_path / "whole", SteerConfig(**config))
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0]
    resumed = sft_trainer(load(tiny_llama), tiny_llama, tmp_path / "resumed", SteerConfig(**config))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    expected = adapter_state(whole.model)
    assert all(p.abs().sum() > 0 for p in expected.values())
    assert all(torch.equal(p, expected[n]) for n, p in adapter_state(resumed.model).items())
    loaded = PeftModel.from_pretrained(load(tiny_llama), tmp_path / "whole" / "checkpoint-6")
    assert all(torch.equal(p, expected[n]) for n, p in adapter_state(loaded).items())
    after = whole.model.unload().state_dict()
    assert all(torch.equal(after[name], x) for name, x in base.items())


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True, "max_length": 32, "attn_implementation": "eager"},
        {"gradient_checkpointing": True},
        {"neftune_noise_alpha": 5.0},
        {"gradient_accumulation_steps": 2},
        {"completion_only_loss": False},
    ],
    ids=lambda o: next(iter(o)),
)
@methods
def test_sft_options(method, tmp_path, tiny_llama, options):
    options = {"max_steps": 10, "learning_rate": 0.03, **options}
    model = AutoModelForCausalLM.from_pretrained(
        tiny_llama, dtype="float32", attn_implementation=options.pop("attn_implementation", "sdpa")
    )
    trainer = sft_trainer(model, tiny_llama, tmp_path, METHODS[method](r=4, task_type="CAUSAL_LM"), **options)
    trainer.train()
    assert all(p.isfinite().all() and p.abs().sum() > 0 for p in adapter_state(trainer.model).values())
    if "neftune_noise_alpha" not in options:  # whose noise hides ten steps of progress
        assert sum(losses(trainer)[-3:]) < sum(losses(trainer)[:3])


@methods
def test_dpo(method, tmp_path, tiny_llama):
    """The reference policy is the model with the adapter off."""
    pairs = sums().map(lambda row: {"chosen": row["completion"], "rejected": "x"}, remove_columns="completion")
    args = DPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, max_steps=6,
    logging_steps=1,
                     learning_rate=0.01, per_device_train_batch_size=4, save_strategy="no")  # fmt: skip
    trainer = DPOTrainer(
        model=load(tiny_llama),
        args=args,
        train_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
        peft_config=METHODS[method](r=4, task_type="CAUSAL_LM"),
    )
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-3)  # the policy is the reference at the start
    assert losses(trainer)[-1] < losses(trainer)[0]
