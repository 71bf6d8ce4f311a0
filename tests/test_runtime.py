"""The tuners under the machinery that people run models with: compile, static caches, accelerate, continuous
batching, TRL."""

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tiny import KINDS, SITES, VOCAB, inputs, make, randomize
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from peft_steer import PostBlockSteerConfig, SteerConfig


def steered(architecture="llama", **config):
    model = get_peft_model(make(architecture), SteerConfig(**{"r": 4, "kind": "nonlinear", **config})).eval()
    randomize(model, std=0.5)
    return model


def logits(model):
    with torch.no_grad():
        return model(**inputs()).logits


@pytest.mark.parametrize(
    ("kind", "site"), [("silu", "block"), ("linear_bias", "block"), ("loreft", "mlp"), ("vector", "attention")]
)
def test_compile_without_graph_breaks(kind, site):
    model = steered(site=site, **KINDS[kind])
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


@pytest.mark.parametrize("site", SITES)
def test_static_cache(site):
    model = steered(site=site)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    x = {**inputs(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    assert torch.equal(model.generate(**x, cache_implementation="static", **options), model.generate(**x, **options))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("site", SITES)
def test_offloaded(site, when):
    """accelerate replaces every module's `forward`; between calls the weights, the adapter's too, lie on the meta
    device."""
    expected = logits(steered(site=site))
    model = make()
    if when == "before":
        cpu_offload(model, execution_device=torch.device("cpu"))
    model = get_peft_model(model, SteerConfig(r=4, kind="nonlinear", site=site)).eval()
    randomize(model, std=0.5)
    if when == "after":
        cpu_offload(model.get_base_model(), execution_device=torch.device("cpu"))
        assert all(p.is_meta for p in model.parameters())
    assert next(model.get_base_model().model.layers[0].mlp.parameters()).is_meta
    assert torch.equal(logits(model), expected)


def test_loading_onto_an_offloaded_base(tmp_path):
    model = steered()
    model.save_pretrained(tmp_path)
    base = cpu_offload(make(), execution_device=torch.device("cpu"))
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded), logits(model))
        loaded.unload()


def test_several_active_adapters_on_an_offloaded_model():
    model = steered()
    model.add_adapter("other", SteerConfig(kind="vector"))
    randomize(model, std=0.5)
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model)
    cpu_offload(model.get_base_model(), execution_device=torch.device("cpu"))
    assert torch.equal(logits(model), expected)


def test_device_map_at_loading(tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "base")
    expected = steered()
    expected.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map={"": "cpu"})
    dispatch_model(loaded, device_map={"": "cpu"}, force_hooks=True)
    assert torch.equal(logits(PeftModel.from_pretrained(loaded, tmp_path / "adapter")), logits(expected))


def test_continuous_batching():
    """Rows of different lengths in one flattened batch over a paged cache generate what each generates alone."""
    model = steered(kind="linear")
    prompts = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": VOCAB, "pad_token_id": 0}
    together = model.get_base_model().generate_batch(
        inputs=prompts, generation_config=GenerationConfig(**options, num_blocks=16, max_batch_tokens=64), warmup=False
    )
    found = sorted(together.values(), key=lambda x: prompts.index(list(x.prompt_ids)))
    for prompt, output in zip(prompts, found, strict=True):
        alone = model.generate(input_ids=torch.tensor([prompt]), **options)[0, len(prompt) :]
        assert output.generated_tokens == alone.tolist()


# --- TRL's trainers, unchanged


@pytest.fixture
def data():
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(6) for b in range(6)]
    return Dataset.from_list(rows)


def sft(tiny_llama, data, output, resume=None, model=None, peft_config=None, **options):
    settings = {
        "max_steps": 6,
        "save_steps": 3,
        "logging_steps": 1,
        "learning_rate": 0.01,
        "per_device_train_batch_size": 4,
    }
    args = SFTConfig(
        output_dir=str(output), report_to="none", use_cpu=True, seed=3, bf16=False, **{**settings, **options}
    )
    trainer = SFTTrainer(
        model=model or AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="float32"),
        args=args,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
        peft_config=peft_config or PostBlockSteerConfig(r=4, task_type="CAUSAL_LM"),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def adapter(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if ".steer_edit." in n}


@pytest.mark.parametrize("kind", ["vector", "linear_bias", "silu", "loreft", "noreft", "direft", "nodireft"])
def test_sft_and_resume(tmp_path, tiny_llama, data, kind):
    """An interrupted run that is resumed ends with the same adapter, bit for bit; the file holds it."""
    config = {"r": 4, "task_type": "CAUSAL_LM", **KINDS[kind]}
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="float32").state_dict()
    whole = sft(tiny_llama, data, tmp_path / "whole", peft_config=SteerConfig(**config))
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    resumed = sft(
        tiny_llama,
        data,
        tmp_path / "resumed",
        str(tmp_path / "whole" / "checkpoint-3"),
        peft_config=SteerConfig(**config),
    )
    expected = adapter(whole)
    assert all(p.abs().sum() > 0 for p in expected.values())
    assert all(torch.equal(p, expected[n]) for n, p in adapter(resumed).items())
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="float32"), tmp_path / "whole" / "checkpoint-6"
    )
    assert all(torch.equal(p, expected[n]) for n, p in loaded.named_parameters() if ".steer_edit." in n)
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
def test_sft_options(tmp_path, tiny_llama, data, options):
    options = {**options}
    model = AutoModelForCausalLM.from_pretrained(
        tiny_llama, dtype="float32", attn_implementation=options.pop("attn_implementation", "sdpa")
    )
    trainer = sft(tiny_llama, data, tmp_path, model=model, **{"max_steps": 10, "learning_rate": 0.03, **options})
    assert all(p.isfinite().all() and p.abs().sum() > 0 for p in adapter(trainer).values())
    if "neftune_noise_alpha" not in options:  # whose noise hides ten steps of progress
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        assert sum(losses[-3:]) < sum(losses[:3])


def test_dpo(tmp_path, tiny_llama, data):
    """The reference policy is the model with the adapter off."""
    pairs = data.map(lambda row: {"chosen": row["completion"], "rejected": "x"}, remove_columns="completion")
    args = DPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, max_steps=6,
    logging_steps=1,
                     learning_rate=0.01, per_device_train_batch_size=4, save_strategy="no")  # fmt: skip
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="float32"),
        args=args,
        train_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
        peft_config=PostBlockSteerConfig(r=4, task_type="CAUSAL_LM"),
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # the policy is the reference at the start
    assert losses[-1] < losses[0]
