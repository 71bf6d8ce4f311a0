"""Affine edits as an ordinary LoRA adapter, which PEFT, vLLM, TGI and llama.cpp load.

With `dh = U D h + v` (`U`: `(d, r)`, `D`: `(r, d)`), strength `s` and the linear layer `y = W x + b0`:

- an edit of its output, `y + s dh(y)`, is `W x + b0 + B A x + c` with `A = D W`, `B = s U`, `c = s (U D b0 + v)`;
- an edit of its input (the heads), `W (x + s dh(x)) + b0`, is the same with `A = D`, `B = s W U`, `c = s W v`.

Both are LoRA with `lora_alpha = r`, and a constant `c`. All modules have one rank, smaller ones are padded with zeros:
some engines ignore `rank_pattern`.
"""

from pathlib import Path
from typing import NamedTuple, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from peft_steer.tuners.steer.merging.plan import plan_merge

from .edits import Edit, check_config, edits_of, steer_config, who_runs_it
from .factors import factors
from .gguf_vector import ARCHITECTURES, write_control_vector


CONSTANTS = ("bias", "vector", "drop")
CONTROL_VECTOR = "control_vector.gguf"


class Pair(NamedTuple):
    """What LoRA adds to a linear layer: `B A x + c`. `A`: `(r, in)`, `B`: `(out, r)`, `c`: `(out,)`, float32."""

    A: torch.Tensor
    B: torch.Tensor
    c: torch.Tensor


def export_lora(
    model: PeftModel,
    folder: str | Path,
    adapter_name: str = "default",
    constants: str | None = None,
    drop_block_0: bool = False,
) -> dict[str, Pair]:
    """Writes an adapter without an activation, at the MLP, the attention or the heads, as LoRA.

    Args:
        model: The loaded adapter, on a base with full-precision weights.
        folder: Where to write it.
        adapter_name: The adapter.
        constants: What becomes of `c`. `"bias"`: LoRA's own bias (`lora_bias`), which PEFT alone loads. `"vector"`:
            `control_vector.gguf` beside the LoRA, which llama.cpp adds. `"drop"`: left out, and the model is another.
        drop_block_0: With `constants="vector"`: leave out block 0's, which llama.cpp cannot add.

    Returns:
        What is added to each linear layer, by its name.

    Raises:
        ValueError: If an edit is not a LoRA, or has a constant and `constants` does not say what becomes of it.
    """
    config = steer_config(model, adapter_name)
    check_lora(config)
    edits = {edit.name: edit for edit in edits_of(model, adapter_name)}
    base = cast(PreTrainedModel, model.get_base_model())
    names = {id(module): name for name, module in base.named_modules()}
    try:
        plan = plan_merge(base, {adapter_name: config}, [adapter_name])
    except ValueError as error:
        raise ValueError(f"as LoRA, an edit has to be a change of one linear layer: {error}") from error
    pairs, blocks = {}, {}
    for layer, linear, _ in plan:
        edit = edits[names[id(layer)].rpartition(".")[0]]
        pairs[names[id(linear)]] = pair_of(edit, linear)
        blocks[names[id(linear)]] = edit
    has_constants = [name for name, pair in pairs.items() if pair.c.any()]
    _check_constants(constants, has_constants, pairs, blocks)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, pairs, base, with_bias=constants == "bias" and bool(has_constants))
    if constants == "vector" and has_constants:
        vectors = {blocks[name].block.index: pairs[name].c for name in has_constants}
        hint = ARCHITECTURES.get(base.config.get_text_config().model_type, "unknown")
        write_control_vector(folder / CONTROL_VECTOR, vectors, hint, drop_block_0)
    return pairs


@torch.no_grad()
def pair_of(edit: Edit, linear: nn.Module) -> Pair:
    """The edit of `linear`'s output (at the heads: of its input) as what LoRA adds to it."""
    weight, bias = cast(nn.Linear, linear).weight.double(), cast(nn.Linear, linear).bias
    W = weight if isinstance(linear, nn.Linear) else weight.t()  # a Conv1D has it transposed
    b0 = W.new_zeros(len(W)) if bias is None else bias.double()
    U, D, v = (x.to(W) for x in factors(edit.module))
    if edit.site == "heads":
        A, B, c = D, W @ U, W @ v
    else:
        A, B, c = D @ W, U, U @ (D @ b0) + v
    return Pair(A.cpu().float(), (edit.scale * B).cpu().float(), (edit.scale * c).cpu().float())


def check_lora(config: PeftConfig) -> None:
    """Raises `ValueError` if no adapter with this configuration is LoRA."""
    config = check_config(config)
    if config.activation is not None:
        raise ValueError(
            f"the adapter has activation={config.activation!r}, and LoRA is linear. {who_runs_it(config)} Or distil "
            "it into kind='linear'."
        )
    if "block" in config.sites and config.kind != "vector":
        raise ValueError(
            f"the adapter has site={config.site!r}, kind={config.kind!r}: LoRA changes what a weight computes, and no "
            "weight reads a block's output and writes to it. vLLM with peft-steer's plugin serves it; or train at "
            "site='mlp'."
        )


def _check_constants(
    constants: str | None, has_constants: list[str], pairs: dict[str, Pair], edits: dict[str, Edit]
) -> None:
    if constants not in (None, *CONSTANTS):
        raise ValueError(f"constants={constants!r} must be one of {', '.join(map(repr, CONSTANTS))}")
    if not has_constants:
        return
    if constants is None:
        raise ValueError(
            f"the adapter adds constants at {len(has_constants)} places (the first is {has_constants[0]!r}), and "
            "most engines' LoRA has none. Choose --constants bias (a bias in the LoRA: exact in PEFT, refused by "
            "vLLM and llama.cpp), --constants vector (a control vector beside the LoRA: llama.cpp alone, at the MLP "
            "alone, not in block 0) or --constants drop (another model than the one that was trained; the difference "
            "is printed). Or export it with --format merged."
        )
    if constants == "drop" and not any(len(pair.A) for pair in pairs.values()):
        raise ValueError("constants='drop': the adapter is nothing but constants, so nothing would be steered")
    if constants == "vector":
        elsewhere = [name for name in has_constants if edits[name].site not in ("mlp", "block")]
        if elsewhere:
            raise ValueError(
                f"constants='vector': the constant at {elsewhere[0]!r} is read by the block's MLP, and llama.cpp adds "
                "control vectors behind it. Choose --constants bias, or --format merged."
            )


def _write(folder: Path, pairs: dict[str, Pair], base: PreTrainedModel, with_bias: bool) -> None:
    r = max(1, *(len(pair.A) for pair in pairs.values()))
    tensors = {}
    for name, pair in pairs.items():
        key = f"base_model.model.{name}.lora"
        missing = r - len(pair.A)
        tensors[f"{key}_A.weight"] = nn.functional.pad(pair.A, (0, 0, 0, missing)).contiguous()
        tensors[f"{key}_B.weight"] = nn.functional.pad(pair.B, (0, missing)).contiguous()
        if with_bias:
            tensors[f"{key}_B.bias"] = pair.c.contiguous()
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        lora_bias=with_bias,
        target_modules=target_modules(base, set(pairs)),
        fan_in_fan_out=not isinstance(base.get_submodule(next(iter(pairs))), nn.Linear),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.name_or_path,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def target_modules(base: nn.Module, names: set[str]) -> list[str]:
    """Short names for the linear layers (`down_proj`) where they mean these layers and no others, as engines expect
    them; else whole names."""
    for parts in (1, 2):
        endings = {".".join(name.split(".")[-parts:]) for name in names}
        meant = {
            name for name, _ in base.named_modules() if any(f".{name}".endswith(f".{ending}") for ending in endings)
        }
        if meant == names:
            return sorted(endings)
    return sorted(names)
