"""An adapter per request, many in one batch, against transformers."""

import json

import pytest
import torch
import transformers as tf
from engines import ARCHITECTURES, difference, load, prompts, run_engine, save_adapter, save_model
from peft import LoraConfig, get_peft_model


def open_engine(folder, base, rounds, sites=("block",), **engine):
    options = {
        "additional_config": {"peft_steer": {"sites": list(sites)}},
        "enable_lora": True,
        "max_loras": 8,
        "max_cpu_loras": 16,
        "max_lora_rank": 8,
        **engine,
    }
    # vLLM cannot return log-probabilities of prompts while LoRA is on.
    found = run_engine(folder, base, rounds, prompt_logprobs=False, **options)
    assert found["error"] is None, found["log"]
    return found["rounds"]


# With LoRA on, vLLM's mixtures of experts need Triton, which has no CPUs: `test_static.py` has them.
MOE = ("qwen3_moe", "mixtral")


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in MOE])
def test_every_architecture(tmp_path, architecture):
    """An adapter at each site, and rows without one."""
    base = save_model(tmp_path / "base", architecture)
    sites = ("block", "mlp", "attention")
    adapters = [None, *(save_adapter(base, tmp_path / site, site=site, kind="loreft") for site in sites)]
    requests = [[prompt, adapters[i % 4]] for i, prompt in enumerate(prompts(8))]
    answers = open_engine(tmp_path, base, [requests], sites)[0]
    tolerance = 1e-3 if architecture == "gemma2" else 1e-4  # whose soft-capping vLLM rounds on CPUs, adapter or not
    plain = load(base)
    for adapter in adapters:
        mine = [i for i, (_, name) in enumerate(requests) if name == adapter]
        chosen = [requests[i] for i in mine], [answers[i] for i in mine]
        assert difference(load(base, adapter), *chosen) < tolerance, adapter
        if adapter is not None:
            assert difference(plain, *chosen) > 0.1, adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("base"))


def test_adapters_of_every_kind_share_a_batch(base, tmp_path):
    """With joint adapters, ordinary LoRAs and rows without any; in another order, too, after the base was reloaded.

    All slots are full, and the LoRA is in the last, which vLLM alone would give to the rows without an adapter.
    """
    lora = get_peft_model(
        tf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    lora.save_pretrained(tmp_path / "lora")
    loreft = save_adapter(base, tmp_path / "loreft", kind="loreft", scale=0.5)
    adapters = [
        save_adapter(base, tmp_path / "silu", kind="nonlinear"),
        None,
        save_adapter(base, tmp_path / "vector", kind="vector"),
        loreft,
        f"{loreft}@0.5",
        save_adapter(base, tmp_path / "tanh", kind="noreft", activation="tanh"),
        save_adapter(base, tmp_path / "joint", method="joint", kind="nonlinear", r=8),
        str(tmp_path / "lora"),
        save_adapter(base, tmp_path / "mlp", kind="direft", activation="gelu", site="mlp"),
    ]
    requests = [[prompt, adapters[i % 9]] for i, prompt in enumerate(prompts(12))]
    rounds = [[r for r in requests if r[1] != adapters[7]], requests, {"reload": None}, requests[::-1]]
    plain, models = load(base), {}
    for adapter in adapters:
        directory, _, scale = (adapter or "").partition("@")
        models[adapter] = load(base, directory or None, float(scale or 1))
    for asked, answers in zip(rounds, open_engine(tmp_path, base, rounds, ("block", "mlp")), strict=True):
        if isinstance(asked, dict):
            assert answers is None, answers
            continue
        for request, answer in zip(asked, answers, strict=True):
            error = difference(models[request[1]], [request], [answer])
            assert error < (1e-4 if request[1] else 1e-5), request
            if request[1]:
                assert difference(plain, [request], [answer]) > 0.1, request


@pytest.mark.parametrize("positions", ["prompt", "completion", "f2+l1", "last"])
def test_positions(base, tmp_path, positions):
    """Prefilled in chunks; beside rows that are steered at every token."""
    adapter = save_adapter(base, tmp_path / "some", kind="nonlinear", positions=positions)
    every = save_adapter(base, tmp_path / "every", kind="nonlinear", seed=2)
    requests = [[prompt, [adapter, every, adapter, None][i % 4]] for i, prompt in enumerate(prompts(8))]
    engine = {"enable_prefix_caching": False, "max_num_batched_tokens": 24, "max_num_seqs": 8}
    answers = open_engine(tmp_path, base, [requests], **engine)[0]
    steered, plain, all_tokens = load(base, adapter), load(base), load(base, every)
    for (prompt, name), answer in zip(requests, answers, strict=True):
        if name != adapter:
            assert difference(all_tokens if name else plain, [[prompt, name]], [answer]) < 1e-4
            continue
        ids = torch.tensor([prompt + answer["tokens"]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100  # says where the prompt ends
        with torch.no_grad():
            logps = steered(input_ids=ids, labels=labels).logits[0, :-1].double().log_softmax(-1)
        expected = logps.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
        torch.testing.assert_close(torch.tensor(answer["logps"]).double(), expected, atol=1e-4, rtol=0)
        assert difference(plain, [[prompt, name]], [answer]) > 0.1


def test_what_the_engine_was_not_opened_for_is_refused(base, tmp_path):
    """vLLM alone would serve the base in its name."""
    cases = {
        "no slots: it was opened for the sites ['block']": {"site": "mlp"},
        "num_blocks=4; this one has 3": {"num_blocks": 4},
        "LoRA rank 16 is greater than max_lora_rank 8": {"r": 16},
        "enable_prefix_caching=False": {"positions": "prompt"},
        "site='heads'": {"site": "heads", "kind": "vector"},
        "'strong' is no strength": {"suffix": "@strong"},
    }
    rounds = []
    for i, config in enumerate(cases.values()):
        recorded = {name: config.pop(name) for name in ("num_blocks",) if name in config}
        suffix = config.pop("suffix", "")
        adapter = save_adapter(base, tmp_path / str(i), **config)
        file = tmp_path / str(i) / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **recorded}))
        rounds.append(adapter + suffix)
    good = save_adapter(base, tmp_path / "good")
    rounds.append([[prompts()[0], good]])
    found = open_engine(tmp_path, base, rounds)
    for message, answer in zip(cases, found, strict=False):
        assert "error" in answer, message
        assert message in answer["error"]
    assert difference(load(base, good), rounds[-1], found[-1]) < 1e-4  # the engine goes on


def test_an_engine_that_was_not_opened_refuses_steering(base, tmp_path):
    """With LoRA on, as for AsyncGRPO, which takes a joint adapter for a LoRA."""
    steer = save_adapter(base, tmp_path / "steer")
    joint = save_adapter(base, tmp_path / "joint", method="joint", kind="nonlinear")
    for answer in open_engine(tmp_path, base, [steer, joint], additional_config={}):
        assert "error" in answer
