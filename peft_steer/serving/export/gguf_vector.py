"""Fixed vectors as llama.cpp's control vector: a GGUF file with one float32 tensor `direction.N` for each block `N`.

llama.cpp adds `direction.N` to the output of block `N` (counted from 0) at every token, as `site="block"` does. It
has no place for block 0. A tensor that it does not expect is not an error: it writes a line to its log and serves the
base. So what is written here is read back.
"""

from pathlib import Path
from typing import cast

import gguf
import numpy as np
import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from peft_steer.interventions.low_rank import FixedVector
from peft_steer.tuners.steer.merging.plan import arrives_unchanged

from .edits import check_config, check_on_cpu_or_gpu, edits_of, steer_config


KIND = "controlvector"
# transformers' `model_type`: llama.cpp's name, of those whose graph adds control vectors.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "smollm3": "smollm3",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "qwen3_5_text": "qwen35",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gemma4_text": "gemma4",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "granite": "granite",
    "gpt2": "gpt2",
    "gpt_neox": "gptneox",
}


def export_gguf_vector(
    model: PeftModel,
    path: str | Path,
    adapter_name: str = "default",
    drop_block_0: bool = False,
    architecture: str | None = None,
) -> dict[int, torch.Tensor]:
    """Writes an adapter of kind `"vector"` as a control vector, with its strength folded in.

    Args:
        model: The loaded adapter. The base's weights are used only for vectors at the MLP, which equal vectors at the
            block's output where nothing but the skip connection follows.
        path: The file to write.
        adapter_name: The adapter.
        drop_block_0: Leave out the vector of block 0, instead of refusing the adapter.
        architecture: llama.cpp's name of the model's architecture, if it is not known here.

    Returns:
        What the file adds, float32 `(d,)`, by block.

    Raises:
        ValueError: If the adapter is not a vector at `"block"` or `"mlp"`, steers block 0, or has a base whose
            architecture llama.cpp does not steer.
    """
    check_vector(steer_config(model, adapter_name))
    hint = architecture or _architecture(model)
    base = model.get_base_model()
    vectors: dict[int, torch.Tensor] = {}
    for edit in edits_of(model, adapter_name):
        if edit.site == "mlp":
            site = base.get_submodule(edit.name)
            check_on_cpu_or_gpu(edit.block.module, edit.block.name)
            if not arrives_unchanged(base, site, edit.block.module):
                raise ValueError(
                    f"what {edit.name!r} returns is scaled or normalized before the block's output, so a vector there "
                    "is no control vector. Train with site='block'."
                )
        v = edit.scale * cast(FixedVector, edit.module).v.detach().cpu().float()
        vectors[edit.block.index] = v + vectors.get(edit.block.index, torch.zeros_like(v))
    write_control_vector(path, vectors, hint, drop_block_0)
    return read_control_vector(path)


def check_vector(config: PeftConfig) -> None:
    """Raises `ValueError` if an adapter with this configuration is no control vector."""
    config = check_config(config)
    if config.kind != "vector" or not set(config.sites) <= {"block", "mlp"}:
        raise ValueError(
            f"the adapter has kind={config.kind!r}, site={config.site!r}: a control vector is a constant added to a "
            "block's output, kind='vector' at site='block' or 'mlp'. Other kinds at the MLP, the attention or the "
            "heads can be exported with --format lora; a low-rank edit of the block's output is served by vLLM with "
            "peft-steer's plugin."
        )


def write_control_vector(
    path: str | Path, vectors: dict[int, torch.Tensor], hint: str, drop_block_0: bool = False
) -> None:
    """Writes `vectors`, `(d,)` by block, and reads them back.

    Raises:
        ValueError: If there is one for block 0 and it may not be dropped, or none is left.
    """
    if 0 in vectors and not drop_block_0:
        raise ValueError(
            "the adapter steers block 0, which llama.cpp cannot: it would refuse the whole file and serve the base. "
            "Train with layers_to_transform=[1, 2, ...], or leave block 0 out with --drop-block-0: on SmolLM2-135M, "
            "vectors of equal size in all 30 blocks lost a third of their effect (KL) by it."
        )
    kept = {block: vectors[block].contiguous().numpy() for block in sorted(vectors) if block}
    if not kept:
        raise ValueError("no vector is left without block 0, so nothing would be steered")
    writer = gguf.GGUFWriter(path, KIND)
    writer.add_string(f"{KIND}.model_hint", hint)
    writer.add_uint32(f"{KIND}.layer_count", len(kept))
    for block, v in kept.items():
        writer.add_tensor(f"direction.{block}", v)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    written = read_control_vector(path)
    if written.keys() != kept.keys() or any(not np.array_equal(written[block], v) for block, v in kept.items()):
        raise OSError(f"{path}: what was written cannot be read back")


def read_control_vector(path: str | Path) -> dict[int, torch.Tensor]:
    """The vectors of a control-vector file, float32 `(d,)`, by block.

    Raises:
        ValueError: If it is no such file, or not one that llama.cpp would run.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path}: no GGUF file: {error}") from error
    field = reader.fields.get("general.architecture")
    kind = field.contents() if field else None
    vectors = {}
    for tensor in reader.tensors:
        name, _, number = tensor.name.partition(".")
        if name != "direction" or not number.isdecimal():
            continue
        shape = [int(n) for n in tensor.shape]
        if tensor.tensor_type != gguf.GGMLQuantizationType.F32 or max(shape) != tensor.n_elements:
            raise ValueError(
                f"{path}: {tensor.name} is {tensor.tensor_type.name} of shape {shape}, and llama.cpp takes "
                "one-dimensional F32 alone: it would serve the base"
            )
        vectors[int(number)] = torch.from_numpy(np.array(tensor.data, dtype=np.float32).flatten())
    if not vectors:
        raise ValueError(f"{path}: no control vector: general.architecture is {kind!r}, and no tensor direction.N")
    return vectors


def how_to_run(path: str | Path, flags: str = "") -> str:
    """The command that serves the file, with other `flags`, and how to see that it acts."""
    return (
        f"llama-server -m MODEL.gguf {flags}--control-vector-scaled {path}:1.0\n"
        "To see that it acts, serve it with :5.0 in place of :1.0: the text must change. If it does not, look for "
        "'control vector' in the server's log. (llama.cpp serves the base when it cannot use a file.)"
    )


def _architecture(model: PeftModel) -> str:
    model_type = cast(PreTrainedModel, model.get_base_model()).config.get_text_config().model_type
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"whether llama.cpp steers the architecture {model_type!r} is not known here; known are "
            f"{', '.join(ARCHITECTURES)}. (BERT's family, PLaMo 2 and draft models are not steered.) If its graph "
            "in llama.cpp calls build_cvec, give its name there with --architecture."
        )
    return ARCHITECTURES[model_type]
