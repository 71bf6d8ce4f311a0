"""Positions under unchanged trainers, and in lm-evaluation-harness."""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import PeftModel, get_peft_model
from positions_reference import expected
from rollouts import grpo
from sft import losses, sft_trainer
from tiny import METHODS, randomize, steer_layers
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from peft_steer import SteerConfig, steered_positions
from peft_steer.evaluation.lm import PeftSteerLM


class Recorder:
    """The tokens, the masks and where the first label is, of each training forward pass."""

    def __init__(self, model):
        self.passes = []
        model.register_forward_hook(self._record, with_kwargs=True)

    def _record(self, module, args, kwargs, output):
        if torch.is_grad_enabled():
            layer = next(iter(steer_layers(module).values()))
            self.passes.append({**kwargs, "steered": layer.steered, "count": steered_positions(module)})


def sequences(batch):
    """`(labels, mask)` of every sequence in a recorded batch, padding left out."""
    for row in range(len(batch["input_ids"])):
        labels, mask = batch["labels"][row], batch["steered"][row]
        if "attention_mask" in batch:
            keep = batch["attention_mask"][row] > 0
            yield labels[keep], mask[keep]
        else:
            starts = (batch["position_ids"][row] == 0).nonzero().flatten().tolist()
            for start, stop in zip(starts, [*starts[1:], labels.numel()], strict=True):
                yield labels[start:stop], mask[start:stop]


PACKINGS = {
    "padded": {},
    "padding-free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 32},
}


@pytest.mark.filterwarnings("ignore:.*(padding-free|packing|flash).*")
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", ["last", "f7+l7", "completion"])
def test_sft(tmp_path, tiny_llama, spec, method, packing):
    """The trainer's own collators; every sequence is steered where its prompt is."""
    config = METHODS[method](r=4, kind="nonlinear", positions=spec, task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    options = {**PACKINGS[packing], "max_steps": 3, "save_strategy": "no"}
    trainer = sft_trainer(model, tiny_llama, tmp_path, config, **options)
    randomize(trainer.model)
    recorder = Recorder(trainer.model)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert all(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if p.requires_grad)
    assert len(recorder.passes) == 3
    found = [pair for batch in recorder.passes for pair in sequences(batch)]
    assert len(found) >= (12 if packing != "packed" else 6)
    for labels, mask in found:
        prompt = int((labels != -100).int().argmax())
        assert prompt == 4  # a+b=
        assert mask.tolist() == expected(spec, prompt, len(labels))
    total = sum(int(mask.sum()) for _, mask in found)
    assert sum(batch["count"] for batch in recorder.passes) == total > 0
    assert len(losses(trainer)) == 3


def test_wrapped_packing_is_refused(tmp_path, tiny_llama):
    """It joins sequences without saying where; every row but the first may begin anywhere."""
    config = SteerConfig(kind="nonlinear", positions="last", task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    options = {"packing": True, "packing_strategy": "wrapped", "max_length": 32, "save_strategy": "no"}
    trainer = sft_trainer(model, tiny_llama, tmp_path, config, **options)
    with pytest.raises(ValueError, match="packing_strategy='wrapped'"):
        trainer.train()


def test_sft_on_chats(tmp_path, tiny_llama):
    """A chat template's tokens are tokens of the prompt, up to the one before the answer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [
        {
            "prompt": [{"role": "user", "content": "1+" * n}],
            "completion": [{"role": "assistant", "content": "is 7"}],
        }
        for n in range(1, 9)
    ]
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama),
        SteerConfig(kind="nonlinear", positions="last", task_type="CAUSAL_LM"),
    )
    trainer = sft_trainer(model, tmp_path / "tokenizer", tmp_path, max_steps=2, save_strategy="no")
    columns = trainer.train_dataset.column_names
    assert "labels" in columns
    trainer = type(trainer)(
        model=model, args=trainer.args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    recorder = Recorder(model)
    trainer.train()
    for batch in recorder.passes:
        assert (batch["steered"].sum(1) == 1).all()
        before = batch["input_ids"][batch["steered"]]
        assert tokenizer.decode(before) == "]" * len(before)


@pytest.mark.parametrize("spec", ["f2+l2", "prompt"])
def test_dpo(tmp_path, tiny_llama, spec):
    rows = [{"prompt": f"{'1+' * n}1=", "chosen": "good", "rejected": "bad one"} for n in range(1, 9)]
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_llama),
        args=DPOConfig(
            output_dir=str(tmp_path),
            report_to="none",
            use_cpu=True,
            bf16=False,
            max_steps=2,
            per_device_train_batch_size=4,
            save_strategy="no",
            gradient_checkpointing=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
        peft_config=SteerConfig(kind="nonlinear", site="mlp", positions=spec, task_type="CAUSAL_LM"),
    )
    recorder = Recorder(trainer.model)
    trainer.train()
    assert len(recorder.passes) == 2
    for labels, mask in (pair for batch in recorder.passes for pair in sequences(batch)):
        prompt = int((labels != -100).int().argmax())
        assert prompt >= 4
        assert mask.tolist() == expected(spec, prompt, len(labels))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", ["last", "f7+l7", "prompt", "completion"])
def test_grpo(tmp_path, tiny_llama, spec, method):
    """The training forward steers where the rollout did: its probabilities of the sampled tokens are those that they
    were sampled with."""
    config = METHODS[method](r=4, kind="nonlinear", positions=spec, task_type="CAUSAL_LM")
    trainer, recorder = grpo(tiny_llama, tmp_path, config)
    training = Recorder(trainer.model)
    trainer.train()
    assert len(recorder.ratios) == 2
    for ratio in recorder.ratios:
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=1e-3, atol=1e-3)
    for labels, mask in (pair for batch in training.passes for pair in sequences(batch)):
        prompt = int((labels != -100).int().argmax())
        assert mask.tolist() == expected(spec, prompt, len(labels))
        assert prompt > 8  # those of test_grpo.PROMPTS


# --- lm-evaluation-harness


@pytest.fixture
def adapter(tmp_path, tiny_llama):
    def make(**config):
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(tiny_llama),
            SteerConfig(r=4, kind="nonlinear", task_type="CAUSAL_LM", **config),
        )
        randomize(model, std=0.5)
        model.save_pretrained(tmp_path)
        return {"pretrained": tiny_llama, "peft": str(tmp_path), "device": "cpu", "batch_size": 3, "max_length": 24}

    return make


def request(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


PAIRS = [
    ("1+2=", "3"),
    ("1+2=", "4"),  # the harness runs the model once for both
    ("1+2", "=3"),  # the same tokens with another context
    ("what is seven?", " seven is"),
    ("a", "b"),
    ("a context that is far too long for the model's window", " so it is cut"),
]


@pytest.mark.parametrize("spec", ["last", "f2+l2", "prompt", "completion", "all"])
def test_loglikelihoods(adapter, spec):
    harness = PeftSteerLM(**adapter(positions=spec))
    # lm_eval 0.4.13 itself scores the first of these wrongly where the third is beside it and shares its forward pass
    pairs = PAIRS if spec != "all" else [pair for pair in PAIRS if pair[0] != "1+2"]
    found = harness.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (logp, greedy) in zip(pairs, found, strict=True):
        ids = harness.tok_encode(context + continuation)[-25:]
        n = len(ids) - len(harness.tok_encode(continuation))
        with torch.no_grad():
            given = {} if spec == "all" else {"prompt_lengths": [n]}
            out = harness.model(torch.tensor([ids[:-1]]), **given).logits[0]
        logps = F.log_softmax(out[n - 1 :], -1)
        want = logps.gather(1, torch.tensor(ids[n:])[:, None])
        assert logp == pytest.approx(want.sum().item(), abs=1e-4)
        assert greedy == (logps.argmax(-1) == torch.tensor(ids[n:])).all().item()
    if spec != "all":
        assert found[0] != found[2]


@pytest.mark.parametrize("size", ["auto", "auto:3"])
def test_batch_sizes_that_are_detected(adapter, size):
    options = adapter(positions="last")
    requests = [request("loglikelihood", *pair) for pair in PAIRS]
    want = PeftSteerLM(**options).loglikelihood(requests, disable_tqdm=True)
    auto = PeftSteerLM(**{**options, "batch_size": size, "max_batch_size": 4})
    found = auto.loglikelihood(requests, disable_tqdm=True)
    assert [x for x, _ in found] == pytest.approx([x for x, _ in want], abs=1e-4)


def test_generation_by_the_harness(adapter):
    harness = PeftSteerLM(**adapter(positions="f2+l2"))
    options = {"until": ["\n"], "max_gen_toks": 4}
    found = harness.generate_until([request("generate_until", text, options) for text, _ in PAIRS[2:5]], True)
    for (text, _), answer in zip(PAIRS[2:5], found, strict=True):
        ids = torch.tensor([harness.tok_encode(text)])
        out = harness.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0
        )
        assert answer == harness.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).split("\n")[0]


def test_what_the_harness_cannot_tell(adapter):
    options = adapter(positions="last")
    with pytest.raises(ValueError, match="--model peft-steer"):
        HFLM(**options).loglikelihood([request("loglikelihood", *PAIRS[0])], disable_tqdm=True)
    with pytest.raises(ValueError, match="rolling loglikelihood"):
        PeftSteerLM(**options).loglikelihood_rolling([request("loglikelihood_rolling", "some text")])
    assert isinstance(PeftSteerLM(**options).model, PeftModel)
