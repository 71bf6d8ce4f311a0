"""What a test of vLLM needs: tiny models on disk, an engine in another process, transformers' log-probabilities."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from tiny import METHODS, randomize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


VOCAB = 257  # a byte, or the end of the text
# Widths that vLLM's kernels for CPUs take.
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,  # of 64s: bitsandbytes unpacks others wrongly on CPUs
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MOE = {"num_experts_per_tok": 2}
OPT = {"word_embed_proj_dim": 64, "ffn_dim": 96, "init_std": 0.2}
GEMMA3 = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
ARCHITECTURES = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**SMALL)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**SMALL)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SMALL)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SMALL)),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**SMALL, **MOE, num_experts=4, moe_intermediate_size=32)
    ),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SMALL, **MOE, num_local_experts=4)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**SMALL)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**{**SMALL, "initializer_range": 0.1})),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**SMALL, **GEMMA3)),
    "cohere": lambda: tf.CohereForCausalLM(tf.CohereConfig(**SMALL, logit_scale=1.0)),
    "cohere2": lambda: tf.Cohere2ForCausalLM(tf.Cohere2Config(**SMALL, logit_scale=1.0)),
    "granite": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**SMALL, residual_multiplier=0.5)),
    "opt": lambda: tf.OPTForCausalLM(tf.OPTConfig(**SMALL, **OPT)),
}


def save_model(folder: Path, architecture: str = "llama") -> str:
    """A tiny random model in a folder, the same for the same arguments."""
    torch.manual_seed(0)
    model = ARCHITECTURES[architecture]()
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["<eos>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    options = {"eos_token": "<eos>", "pad_token": "<eos>", "chat_template": template}
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options).save_pretrained(folder)
    return str(folder)


def save_adapter(base: str, folder: Path, method: str = "steer", seed: int = 1, std: float = 0.3, **config) -> str:
    """A random adapter for the model in `base`."""
    model = tf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, METHODS[method](**{"r": 4, "task_type": "CAUSAL_LM", **config}))
    randomize(model, std=std, seed=seed)
    model.save_pretrained(folder)
    return str(folder)


def prompts(number: int = 4, seed: int = 0) -> list[list[int]]:
    """Random prompts of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (4 + 3 * i,), generator=generator).tolist() for i in range(number)]


def run_engine(
    folder: Path, model: str, rounds: list, prompt_logprobs: bool = True, max_tokens: int = 8, **engine
) -> dict:
    """What `engine_worker.py` found for each round: a list of requests `(prompt, adapter or None)`, an adapter to be
    loaded, or `{"reload": a file of weights or None}`."""
    engine = {
        "model": model,
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "max_model_len": 96,
        "max_num_seqs": 16,
        "enforce_eager": True,
        "seed": 0,
        "distributed_executor_backend": "uni",  # all in one process, which starts faster
        **engine,
    }
    spec = {"engine": engine, "rounds": rounds, "max_tokens": max_tokens, "prompt_logprobs": prompt_logprobs}
    Path(folder).mkdir(parents=True, exist_ok=True)
    spec_file, result_file = Path(folder) / "spec.json", Path(folder) / "result.json"
    spec_file.write_text(json.dumps(spec))
    log = run_python([str(Path(__file__).with_name("engine_worker.py")), str(spec_file), str(result_file)])
    assert result_file.is_file(), log
    return {**json.loads(result_file.read_text()), "log": log}


_rooms = itertools.count()


def environment() -> dict[str, str]:
    """That of a process with an engine of its own.

    TRL takes port 29500 if it is free, and listens on it much later, as vLLM does on others. So that two processes
    cannot have the same, each gets a few of its own, below those that a system gives to whoever asks for any.
    """
    first = 10000 + (os.getpid() * 80 + next(_rooms) * 8) % 20000
    ports = {"MASTER_PORT": str(first), "VLLM_PORT": str(first + 2)}
    return {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", **ports}


def run_python(arguments: list[str]) -> str:
    """What a Python process with an engine in it prints."""
    variables = {**environment(), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    # Seconds: a start takes 15, on a machine with other work ten times that.
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=variables, timeout=1800)
    return done.stdout[-4000:] + done.stderr[-8000:]


@torch.no_grad()
def reference(model: torch.nn.Module, prompt: list[int], tokens: list[int], with_prompt: bool) -> torch.Tensor:
    """Log-probabilities of `tokens`, and before them of the prompt's, by transformers in one forward pass."""
    ids = torch.tensor([prompt + tokens])
    logps = model(ids).logits[0, :-1].double().log_softmax(-1)
    logps = logps.gather(-1, ids[0, 1:, None])[:, 0]
    return logps if with_prompt else logps[len(prompt) - 1 :]


def difference(model: torch.nn.Module, requests: list, answers: list) -> float:
    """The largest difference of an engine's log-probabilities from `model`'s."""
    worst = 0.0
    for (prompt, _), answer in zip(requests, answers, strict=True):
        with_prompt = len(answer["logps"]) > len(answer["tokens"])
        found = torch.tensor(answer["logps"], dtype=torch.float64)
        worst = max(worst, (found - reference(model, prompt, answer["tokens"], with_prompt)).abs().max().item())
    return worst


def load(base: str, adapter: str | None = None, scale: float = 1.0) -> torch.nn.Module:
    """The model that transformers runs: the base, or with an adapter at a strength."""
    model = tf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if adapter is None:
        return model
    model = PeftModel.from_pretrained(model, adapter).eval()
    if scale != 1:
        model.base_model.scale_layer(scale)
    return model


def run_training(folder: Path, model: str, trainer: str = "grpo", **spec) -> dict:
    """What `rollout_worker.py` found."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    spec = {"model": model, "trainer": trainer, "output": str(Path(folder) / "out"), **spec}
    spec_file, result_file = Path(folder) / "spec.json", Path(folder) / "result.json"
    spec_file.write_text(json.dumps(spec))
    log = run_python([str(Path(__file__).with_name("rollout_worker.py")), str(spec_file), str(result_file)])
    assert result_file.is_file(), log
    return {**json.loads(result_file.read_text()), "log": log}
