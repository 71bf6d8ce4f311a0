"""Fixtures for all tests. Nothing here may reach a network."""

import os
import sys
from functools import partial
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"  # before anything of Hugging Face is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are slower with more, the more so on a busy machine

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


if os.environ.get("MISALIGNED"):
    import misaligned

    misaligned.install()

# Other processes that a test starts find the helpers as this one does.
_HELPERS = Path(__file__).parent / "helpers"
_FOLDERS = [_HELPERS, *(folder for folder in _HELPERS.iterdir() if folder.is_dir())]
os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, _FOLDERS), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> str:
    """The folder of a random two-block Llama with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["<eos>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,  # large enough for logits that training can move
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def bench_reference(tiny_llama, tmp_path_factory):
    """Cells of the benchmark, their results of an uninterrupted run one at a time, and where these are."""
    from bench_cells import some_cells

    from peft_steer.bench.engines import make_engine
    from peft_steer.bench.scheduler import run_cells
    from peft_steer.bench.store import Store

    cells, store = some_cells(tiny_llama), Store(tmp_path_factory.mktemp("bench"))
    with make_engine() as engine:
        return cells, run_cells(cells, store, engine), store


@pytest.fixture
def command(monkeypatch):
    """`peft-steer lm-eval` in this process, on our tasks."""
    import lm_eval.evaluator
    import lm_eval.tasks

    from peft_steer.commands import lm_eval as harness
    from peft_steer.commands import shell

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", None)  # put back afterwards
    monkeypatch.setattr(harness, "_TaskManager", partial(harness._TaskManager, include_defaults=False))
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)  # which asks pip for all packages
    target = "peft_steer.commands.lm_eval:main"
    return lambda *arguments: shell.run("peft-steer lm-eval", target, list(map(str, arguments)))
