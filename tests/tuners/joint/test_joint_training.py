"""Joint adapters under TRL's trainer, unchanged, and on several processes."""

from functools import partial

import pytest
import torch
import transformers as tf
import two_processes
from joint_models import MODES, TOLERANCE, joint, worst
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from sft import losses, sft_trainer
from tiny import BASES, adapter_state, inputs, make
from transformers import Trainer
from trl import SFTConfig

from peft_steer import JointOptimizer, JointSteerLoraConfig, project_


def made_as_in(args, model, *rates, **named_rates):
    factory, kwargs = JointOptimizer.as_in(args, model, *rates, **named_rates)
    return factory()(model, **kwargs)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_llama):
    """A tiny Llama that is 64 wide, bitsandbytes' block size, with a tokenizer."""
    path = tmp_path_factory.mktemp("base")
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, **sizes)).save_pretrained(path)
    return path


def load(checkpoint, base="fp32"):
    return tf.AutoModelForCausalLM.from_pretrained(checkpoint, **BASES[base])


def config_for(mode, interval=3):
    options = {**MODES[mode], "orthogonal_interval": interval} if mode == "periodic" else MODES[mode]
    return JointSteerLoraConfig(r=4, steer_r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)


@pytest.mark.parametrize("mode", ["always", "periodic"])
@pytest.mark.parametrize("base", ["fp32", "bf16", "nf4", "int8"])
def test_sft_on_every_base(tmp_path, checkpoint, base, mode):
    """It learns; the base stays as it is; what is saved satisfies the constraint and loads equal."""
    model = load(checkpoint, base)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = sft_trainer(model, checkpoint, tmp_path, config_for(mode), gradient_checkpointing=base != "int8")
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    assert {x.dtype for n, x in run.model.named_parameters() if "W_down" in n} == {torch.float32}
    assert worst(run.model) < TOLERANCE
    assert all(x.float().abs().sum() > 0 for n, x in adapter_state(run.model).items() if "lora_B" in n or "W_up" in n)
    names = {
        n.replace(".base_layer", "").removeprefix("base_model.model."): p for n, p in run.model.named_parameters()
    }
    assert all(torch.equal(names[n], p) for n, p in frozen.items())
    project_(run.model)
    loaded = PeftModel.from_pretrained(load(checkpoint, base), tmp_path / "checkpoint-6")
    expected = adapter_state(run.model)
    assert all(torch.equal(x.to(expected[n].dtype), expected[n]) for n, x in adapter_state(loaded).items())
    assert worst(loaded) < TOLERANCE


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_resuming(tmp_path, checkpoint, mode, accumulation):
    """A run that was interrupted between projections and resumed ends bit for bit where the other does."""
    options = {"save_steps": 3, "gradient_accumulation_steps": accumulation}  # at a multiple of the interval
    whole = sft_trainer(load(checkpoint), checkpoint, tmp_path / "whole", config_for(mode), **options)
    whole.train()
    resumed = sft_trainer(load(checkpoint), checkpoint, tmp_path / "resumed", config_for(mode), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    expected, found = adapter_state(whole.model), adapter_state(resumed.model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(x, expected[n]) for n, x in found.items())
    assert (worst(resumed.model) < TOLERANCE) == (mode != "none")
    if mode == "periodic":
        assert {x.item() for n, x in found.items() if n.endswith("steps")} == {6}


@pytest.mark.parametrize("mode", MODES)
def test_saving_does_not_change_training(tmp_path, mode):
    """Between projections too: the weights stay bit for bit, and evaluation is that of the file."""
    models = [joint(**{**MODES[mode], **({"orthogonal_interval": 4} if mode == "periodic" else {})}) for _ in range(2)]
    x = inputs()
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.05) for m in models]
    for step in range(6):
        for model, optimizer in zip(models, optimizers, strict=True):
            model.train()(**x, labels=x["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        models[0].save_pretrained(tmp_path / str(step))
        states = [adapter_state(model) for model in models]
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
        loaded = PeftModel.from_pretrained(make(), tmp_path / str(step)).eval()
        assert worst(loaded) < TOLERANCE or mode == "none"
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                found, want = (m.eval()(**x).logits for m in (models[0], loaded))
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    if mode == "periodic":  # it makes a difference
        with torch.no_grad():
            assert (models[0].train()(**x).logits - want).abs().max() > 1e-3


@pytest.mark.parametrize("how", ["optimizers", "optimizer_cls_and_kwargs"])
def test_learning_rates(tmp_path, checkpoint, how):
    """Each half has its own, and the scheduler scales both; a rate of zero leaves a half where it was."""
    if how == "optimizers":
        model = get_peft_model(load(checkpoint), config_for("always"))
        args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, weight_decay=0.1)
        optimizer = made_as_in(args, model, lora_lr=0.0, steer_lr=0.02)
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}
        run = sft_trainer(model, checkpoint, tmp_path, trainer_options={"optimizers": (optimizer, None)})
    else:
        choice = (JointOptimizer, {"lora_lr": 0.0, "steer_lr": 0.02})
        run = sft_trainer(
            load(checkpoint),
            checkpoint,
            tmp_path,
            config_for("always"),
            trainer_options={"optimizer_cls_and_kwargs": choice},
        )
    before = adapter_state(run.model)
    run.train()
    for name, x in adapter_state(run.model).items():
        assert torch.equal(x, before[name]) == (".steering." not in name), name
    rates = [group["lr"] for group in run.optimizer.param_groups]
    assert rates == [0.0, pytest.approx(0.0)]
    seen = [row["learning_rate"] for row in run.state.log_history if "learning_rate" in row]
    assert len(seen) == 6
    assert run.lr_scheduler.base_lrs == [0.0, 0.02]


def test_learning_rates_need_both_halves(tmp_path, monkeypatch):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="The steering half has no parameters"):
        made_as_in(args, get_peft_model(make(), LoraConfig(target_modules="all-linear")), 1e-3, 1e-3)
    # As transformers describes GaLore's and LOMO's, whose packages are not among ours.
    taken = (torch.optim.AdamW, {"lr": 1e-3, "params": []})
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", lambda *_: taken)
    with pytest.raises(ValueError, match="makes its own groups of parameters"):
        made_as_in(args, joint(), 1e-3, 1e-3)


@pytest.fixture(scope="module")
def trained_by_two(tmp_path_factory):
    """Overlaps after each step and the saved state, by mode and kind of parallelism."""
    models = {mode: partial(joint, **config) for mode, config in MODES.items()}
    return two_processes.run(models, tmp_path_factory.mktemp("distributed") / "out.pt")


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("mode", MODES)
def test_several_processes(trained_by_two, mode, kind):
    """Two processes with half a batch each train the adapter that one with the whole batch does."""
    overlaps, state = trained_by_two[mode, kind]
    model = joint(**MODES[mode]).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    x = inputs(rows=4)
    for step, found in enumerate(overlaps, 1):
        model(**x, labels=x["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert (found < TOLERANCE) == (mode == "always" or (mode == "periodic" and step % 2 == 0))
    expected = get_peft_model_state_dict(model)
    assert state.keys() == expected.keys()
    for name, p in expected.items():
        torch.testing.assert_close(state[name], p, rtol=1e-3, atol=1e-4)
