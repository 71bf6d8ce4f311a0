"""A local stand-in for the Hub: tiny random models in the layout of the Hugging Face cache.

PEFT's tests load models by Hub id. This module builds a model of the same architecture for each id, with random
weights and a small byte-level tokenizer, so that the tests run without a network.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from peft import LoraConfig
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

REVISION = "0" * 40
VOCAB = 512

_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
_MISTRAL = dict(_LLAMA, num_key_value_heads=2)
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 5,
    "n_head": 4,
    "n_positions": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
_DEBERTA = dict(_BERT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False)
_OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 4,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
_OPT_125M = dict(_OPT, hidden_size=64, word_embed_proj_dim=64, ffn_dim=128, num_hidden_layers=12, dropout=0.1)
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_ff": 37,
    "d_kv": 8,
    "num_layers": 5,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_BART = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 4,
    "decoder_ffn_dim": 4,
    "max_position_embeddings": 512,
    "init_std": 0.2,  # at the default 0.02 the attention's output is lost beside the skip connection
}
_GEMMA3 = dict(_LLAMA, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"])

# Hub id -> (model class, configuration class, configuration). The sizes are those of the Hub's models as far as the
# tests rely on them (number of layers, the width that a rank has to fit into); the vocabularies are smaller.
MODELS: dict[str, tuple[str, str, dict]] = {
    "bert-base-uncased": ("BertForSequenceClassification", "BertConfig", _BERT),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", "Gemma3TextConfig", _GEMMA3),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", "MistralConfig", _MISTRAL),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "peft-internal-testing/opt-125m": ("OPTForCausalLM", "OPTConfig", _OPT_125M),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", "Qwen2Config", dict(_LLAMA, hidden_size=8)),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        "BartConfig",
        _BART,
    ),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        "BertConfig",
        _BERT,
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", "BertConfig", _BERT),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", "DebertaConfig", _DEBERTA),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", "DebertaV2Config", _DEBERTA),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", "GPTJConfig", dict(_GPT2, rotary_dim=4)),
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", "OPTConfig", _OPT),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        dict(_BERT, pad_token_id=1),
    ),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", "RobertaConfig", dict(_BERT, pad_token_id=1)),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        "T5Config",
        _T5,
    ),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        "LlamaConfig",
        dict(_LLAMA, pad_token_id=0),
    ),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", "Qwen3Config", dict(_LLAMA, head_dim=8)),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
}

# Adapter repositories of which the tests read no more than the configuration.
ADAPTER_CONFIGS: dict[str, tuple[str, str]] = {
    "peft-internal-testing/tiny-opt-lora-revision": ("test", "peft-internal-testing/tiny-random-OPTForCausalLM"),
    "ybelkada/test-st-lora": ("main", "peft-internal-testing/tiny-random-OPTForCausalLM"),
}

_TEXT = ["This is a test prompt.", "The quick brown fox jumps over the lazy dog.", "<s> </s> <pad> 0123456789"]


def _tokenizer() -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    bpe.train_from_iterator(_TEXT, vocab_size=300, special_tokens=special, show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _publish(cache: Path, repo_id: str, revision: str, write: Callable[[Path], None]) -> None:
    """Put a repository into the cache, all or nothing: an interrupted build leaves no half-written snapshot."""
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / REVISION
    if not snapshot.exists():
        partial = repo / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        snapshot.parent.mkdir(exist_ok=True)
        partial.rename(snapshot)
    for ref in {"main", revision}:
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / ref).write_text(REVISION)


def _write_model(folder: Path, model_name: str, config_name: str, kwargs: dict) -> None:
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**kwargs))
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def build(cache: Path) -> None:
    """Build every missing repository below `cache`, a Hub cache directory (what `HF_HUB_CACHE` names)."""
    for repo_id, model in MODELS.items():
        _publish(cache, repo_id, "main", lambda folder, model=model: _write_model(folder, *model))
    for repo_id, (revision, base) in ADAPTER_CONFIGS.items():
        config = LoraConfig(base_model_name_or_path=base, target_modules=["q_proj", "v_proj"])
        _publish(cache, repo_id, revision, config.save_pretrained)
