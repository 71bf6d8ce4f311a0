"""Tiny random models of many architectures, and the steering equations written plainly, as the oracle of the tests."""

import torch
import torch.nn.functional as F
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import nn

from peft_steer import JointLowRank, JointSteerLoraConfig, SteerConfig
from peft_steer.tuners.steer.layer import SteerLayer


VOCAB, D = 99, 32
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": D,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts_per_tok": 2}


def _vision_language():
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            vision_config=tf.CLIPVisionConfig(**vision),
            text_config=tf.LlamaConfig(**SMALL),
            image_token_index=VOCAB - 1,
        )
    )


ARCHITECTURES = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**SMALL)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SMALL)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**SMALL)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(
            **SMALL, sliding_window=4, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
        )
    ),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**{**SMALL, "num_key_value_heads": 4})),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SMALL, **MOE, num_local_experts=4)),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**SMALL, **MOE, num_experts=4, moe_intermediate_size=24)
    ),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=VOCAB,
            hidden_size=D,
            ffn_dim=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=D,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"})),
    "bloom": lambda: tf.BloomForCausalLM(
        tf.BloomConfig(
            vocab_size=VOCAB, hidden_size=D, n_layer=3, n_head=4, pad_token_id=0, bos_token_id=1, eos_token_id=2
        )
    ),
    "llava": _vision_language,
    "bert": lambda: tf.BertForMaskedLM(
        tf.BertConfig(**{k: v for k, v in SMALL.items() if k not in ("head_dim", "num_key_value_heads")})
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=VOCAB,
            d_model=D,
            d_kv=8,
            d_ff=48,
            num_layers=3,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=2,
        )
    ),
}
DECODERS = [name for name in ARCHITECTURES if name not in ("bert", "t5")]
STACKS = {
    "bert": ["bert.encoder.layer"],
    "t5": ["encoder.block", "decoder.block"],
    "llava": ["model.language_model.layers"],
}
STACKS |= {
    "gpt2": ["transformer.h"],
    "bloom": ["transformer.h"],
    "opt": ["model.decoder.layers"],
    "gpt_neox": ["gpt_neox.layers"],
}

# every kind, as arguments of SteerConfig
KINDS = {
    "vector": {"kind": "vector"},
    "linear": {"kind": "linear"},
    "linear_bias": {"kind": "linear", "use_bias": True},
    "silu": {"kind": "nonlinear"},
    "relu": {"kind": "nonlinear", "activation": "relu"},
    "gelu": {"kind": "nonlinear", "activation": "gelu"},
    "tanh": {"kind": "nonlinear", "activation": "tanh"},
    "loreft": {"kind": "loreft"},
    "noreft": {"kind": "noreft"},
    "direft": {"kind": "direft"},
    "direft_tanh": {"kind": "direft", "activation": "tanh"},
    "nodireft": {"kind": "nodireft"},
    "nodireft_relu": {"kind": "nodireft", "activation": "relu"},
}
# one for each set of parameters
STORED = [name for name in KINDS if name not in ("relu", "gelu", "tanh", "direft_tanh", "nodireft_relu")]
REFT = ("noreft", "direft", "direft_tanh", "nodireft", "nodireft_relu")
# those that edit attention heads only
HEAD_KINDS = {"lofit": {"site": "heads", "kind": "lofit"}, "jola": {"site": "heads", "kind": "jola"}}
SITES = ("block", "mlp", "attention", "heads")

# arguments of `from_pretrained`, by what the base's weights are
BASES = {
    "fp32": {"dtype": torch.float32},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
    "nf4": {"quantization_config": tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")},
    "nf4_double": {
        "quantization_config": tf.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    },
    "int8": {"quantization_config": tf.BitsAndBytesConfig(load_in_8bit=True)},
}


def joint_config(**steer) -> JointSteerLoraConfig:
    """The joint adapter whose steering half has these arguments of SteerConfig."""
    common = {k: steer.pop(k) for k in ("task_type", "modules_to_save") if k in steer}
    return JointSteerLoraConfig(
        r=4, target_modules="all-linear", **common, **{f"steer_{name}": value for name, value in steer.items()}
    )


# what a test is parametrized with to hold for both tuners: makes a configuration from SteerConfig's arguments
METHODS = {"steer": SteerConfig, "joint": joint_config}
METHODS_AT_SITES = [(method, site) for method in METHODS for site in SITES if (method, site) != ("joint", "heads")]


def make(architecture: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A tiny frozen model in evaluation mode, the same for the same arguments. (T5's attention takes another kernel,
    with other rounding, where its position bias requires gradients.)"""
    torch.manual_seed(seed)
    return ARCHITECTURES[architecture]().to(dtype).eval().requires_grad_(False)


def inputs(architecture: str = "llama", rows: int = 2, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB - 1, (rows, length), generator=generator)
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)} if architecture == "t5" else {"input_ids": ids}


def randomize(model: nn.Module, std: float = 0.1, seed: int = 1) -> None:
    """Give every adapter parameter random values, so that the adapters act."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "steering." in name or ".lora_" in name:
                p.copy_(std * torch.randn(p.shape, generator=generator))


def as_saved(model: nn.Module) -> nn.Module:
    """The model with the edits of its joint adapters projected, as a file has them."""
    for module in model.modules():
        if isinstance(module, JointLowRank):
            module.project_()
    return model


def adapted(
    architecture: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 1, method: str = "steer", **config
) -> PeftModel:
    """A tiny model with a random adapter."""
    model = get_peft_model(make(architecture, dtype), METHODS[method](**{"r": 4, "kind": "nonlinear", **config}))
    randomize(model, std=0.5, seed=seed)
    return model.eval()


def logits(model: nn.Module, architecture: str = "llama", **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(architecture), **kwargs).logits


def assert_equal_but_for_rounding(found: torch.Tensor, expected: torch.Tensor, ulp: int | None = None) -> None:
    """Equal within a few units in the last place of the largest value. The last bits of a product depend on the
    processor and on where in memory its operands lie: two models with equal parameters may differ by that alone."""
    ulp = ulp or (32 if expected.dtype == torch.float32 else 4)
    atol = ulp * torch.finfo(expected.dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """A copy that begins one element after an aligned address, as tensors in a mapped file may."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype)
    return memory[1:].view(x.shape).copy_(x)


def adapter_state(model: nn.Module, name: str = "default") -> dict[str, torch.Tensor]:
    """A copy of all tensors of the adapter of that name."""
    return {key: x.detach().clone() for key, x in model.state_dict().items() if f".{name}." in key}


def reference_delta(edit: nn.Module, h: torch.Tensor) -> torch.Tensor:
    """`dh` of an intervention, written out in float64 from its parameters alone."""
    p = {name: x.detach().double() for name, x in edit.named_parameters()}
    h = h.double()
    kind = type(edit).__name__
    if kind in ("Lofit", "Jola"):
        a, v = p["A"], p["v"]
        if kind == "Jola":
            g1, g2 = (torch.clamp(1.2 * torch.sigmoid(p[name]) - 0.1, 0, 1) for name in ("log_g1", "log_g2"))
            a, v = g2[:, None] * a, g1[:, None] * v
        heads = h.view(*h.shape[:-1], *a.shape)
        return ((1 + a) * heads + v - heads).flatten(-2)
    if "v" in p:
        return p["v"].expand_as(h)
    act = {None: lambda x: x, "silu": F.silu, "relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh}[
        getattr(edit, "activation", None)
    ]
    if kind in ("Loreft", "Direft"):
        R = torch.stack(_gram_schmidt(list(p["V"])))
        return (act(h @ p["W"].T + p["b"]) - (h @ R.T if kind == "Loreft" else 0.0)) @ R
    if kind in ("Noreft", "Nodireft"):
        return (act(h @ p["W1"].T + p["b"]) - (h @ p["W2"].T if kind == "Noreft" else 0.0)) @ p["W2"]
    z = h @ p["W_down"].T
    return act(z) @ p["W_up"].T + p.get("b", 0.0)


def _gram_schmidt(rows: list[torch.Tensor]) -> list[torch.Tensor]:
    basis: list[torch.Tensor] = []
    for row in rows:
        for unit in basis:
            row = row - (row @ unit) * unit
        basis.append(row / row.norm())
    return basis


def steer_layers(model: nn.Module) -> dict[str, SteerLayer]:
    """The steering layers by the name of the module that they steer."""
    return {name.rpartition(".")[0]: m for name, m in model.named_modules() if isinstance(m, SteerLayer)}
