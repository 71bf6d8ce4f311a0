"""llama.cpp's server on a Llama that is written here, float32 throughout: what it expects next, by token ids."""

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file


SERVER = shutil.which("llama-server")
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OTHER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def _name(module: str) -> str:
    """llama.cpp's name of a module of transformers' Llama."""
    if module in _OTHER:
        return _OTHER[module]
    _, _, block, place = module.split(".", 3)
    return f"blk.{block}.{_LAYER[place]}"


def _rotary(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in llama.cpp's order: the two halves that are rotated together stand side by side."""
    return weight.view(heads, 2, len(weight) // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_model(model, tokens: list[str], path: Path) -> None:
    """Writes a `LlamaForCausalLM`. `tokens` name its ids; nothing is tokenized."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    for key, x in model.state_dict().items():
        module = key.removesuffix(".weight")
        if module == "lm_head" and config.tie_word_embeddings:
            continue
        x = x.float()
        if module.endswith(("q_proj", "k_proj")):
            x = _rotary(x, config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads)
        writer.add_tensor(f"{_name(module)}.weight", x.numpy())
    _finish(writer)


def write_lora(folder: Path, path: Path) -> None:
    """A LoRA adapter that PEFT saved, as `convert_lora_to_gguf.py` writes it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", config["lora_alpha"])
    for key, x in load_file(folder / "adapter_model.safetensors").items():
        module, _, side = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        writer.add_tensor(f"{_name(module)}.weight.{side.lower()}", x.numpy())
    _finish(writer)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def served(model: Path, *flags: str) -> Iterator[str]:
    """The address of a server of `model`, float32 cache and one thread."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    exact = ["-c", "256", "-np", "1", "-t", "1", "-ctk", "f32", "-ctv", "f32", "-fa", "off", "--no-warmup"]
    call = [SERVER, "-m", str(model), "--host", "127.0.0.1", "--port", str(port), *exact, *flags]
    log = model.with_suffix(".log")
    with log.open("w") as out, subprocess.Popen(call, stdout=out, stderr=subprocess.STDOUT) as server:
        try:
            _wait(server, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def _wait(server: subprocess.Popen, address: str, log: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            if urllib.request.urlopen(f"{address}/health").status == 200:
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise RuntimeError(f"llama-server does not answer:\n{log.read_text()[-2000:]}")


def next_log_probs(address: str, ids: list[int], size: int) -> torch.Tensor:
    """What it expects after `ids`, log-probabilities of all tokens, `(size,)`."""
    asked = {"prompt": ids, "n_predict": 1, "n_probs": size, "temperature": 0.0, "cache_prompt": False}
    request = urllib.request.Request(
        f"{address}/completion", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    answer = json.load(urllib.request.urlopen(request))
    found = torch.full((size,), float("nan"))
    for entry in answer["completion_probabilities"][0]["top_logprobs"]:
        found[entry["id"]] = entry["logprob"]
    return found
