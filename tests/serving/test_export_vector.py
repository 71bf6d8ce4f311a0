"""Fixed vectors as llama.cpp's control vector: what the file holds, what llama.cpp does with it, what is refused."""

import gguf
import numpy as np
import pytest
import torch
from tiny import D, adapted, inputs, make

from peft_steer.serving.export import export_gguf_vector
from peft_steer.serving.export.gguf_vector import read_control_vector


def logits(model, architecture="llama"):
    with torch.no_grad():
        return model(**inputs(architecture)).logits


def run_as_llama_cpp(path, architecture="llama", strength=1.0):
    """`h + strength * direction.N` at the output of block `N`, counted from 0, of the base."""
    model = make(architecture)
    stack = model.transformer.h if architecture == "gpt2" else model.model.layers
    for tensor in gguf.GGUFReader(path).tensors:
        v = torch.from_numpy(np.array(tensor.data)) * strength

        def add(module, args, output, v=v):
            return (output[0] + v, *output[1:]) if isinstance(output, tuple) else output + v

        stack[int(tensor.name.removeprefix("direction."))].register_forward_hook(add)
    return logits(model, architecture)


@pytest.mark.parametrize("site", ["block", "mlp", ["block", "mlp"]], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gemma3", "mixtral", "gpt2"])
def test_llama_cpp_equation(architecture, site, tmp_path):
    model = adapted(architecture, kind="vector", site=site, layers_to_transform=[1, 2], scale=0.8)
    model.base_model.set_scale("default", -0.5)
    export_gguf_vector(model, tmp_path / "v.gguf")
    expected = logits(model, architecture)
    torch.testing.assert_close(run_as_llama_cpp(tmp_path / "v.gguf", architecture), expected, atol=1e-5, rtol=0)
    assert (expected - logits(make(architecture), architecture)).abs().max() > 0.01  # the control


def test_what_llama_cpp_reads(tmp_path):
    """Its loader takes one-dimensional float32 tensors `direction.N` with N >= 1, and nothing else."""
    model = adapted(kind="vector", layers_to_transform=[1, 2])
    export_gguf_vector(model, tmp_path / "v.gguf")
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "llama",
        "controlvector.layer_count": 2,
    }
    assert [t.name for t in reader.tensors] == ["direction.1", "direction.2"]
    assert {(t.tensor_type.name, tuple(t.shape)) for t in reader.tensors} == {("F32", (D,))}
    layers = model.get_base_model().model.layers
    for tensor in reader.tensors:
        v = layers[int(tensor.name[-1])].steering.steer_edit["default"].v
        assert np.array_equal(tensor.data, v.detach().numpy())


def test_block_0(tmp_path):
    model = adapted(kind="vector")
    with pytest.raises(ValueError, match=r"block 0.*--drop-block-0"):
        export_gguf_vector(model, tmp_path / "v.gguf")
    assert not (tmp_path / "v.gguf").exists()
    assert sorted(export_gguf_vector(model, tmp_path / "v.gguf", drop_block_0=True)) == [1, 2]
    only_0 = adapted(kind="vector", layers_to_transform=[0])
    with pytest.raises(ValueError, match="nothing would be steered"):
        export_gguf_vector(only_0, tmp_path / "0.gguf", drop_block_0=True)


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("llama", {"kind": "linear"}, "vLLM"),
        ("llama", {"kind": "vector", "site": "attention"}, "--format lora"),
        ("llama", {"kind": "vector", "site": ["block", "heads"]}, "--format lora"),
        ("llama", {"kind": "vector", "positions": "last"}, "positions='last'"),
        ("bert", {"kind": "vector"}, "'bert' is not known here.*build_cvec"),
        ("llama", {"method": "joint", "kind": "vector"}, "JOINT_STEER_LORA"),
    ],
)
def test_refused(architecture, config, message, tmp_path):
    model = adapted(architecture, **config)
    with pytest.raises(ValueError, match=message):
        export_gguf_vector(model, tmp_path / "v.gguf", drop_block_0=True)
    assert not (tmp_path / "v.gguf").exists()


def test_an_mlp_that_is_rescaled_is_refused(tmp_path):
    model = adapted(kind="vector", site="mlp", layers_to_transform=[1])
    block = model.get_base_model().model.layers[1]
    forward = block.forward
    block.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)
    with pytest.raises(ValueError, match="scaled or normalized"):
        export_gguf_vector(model, tmp_path / "v.gguf")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"direction.1": np.ones(4, np.float16)}, "F16"),
        ({"direction.1": np.ones((2, 4), np.float32)}, "one-dimensional"),
        ({"token_embd.weight": np.ones(4, np.float32)}, "no tensor direction.N"),
    ],
)
def test_files_that_llama_cpp_would_ignore(tensors, message, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "controlvector")
    for name, x in tensors.items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=message):
        read_control_vector(tmp_path / "v.gguf")


def test_no_gguf_file(tmp_path):
    (tmp_path / "v.gguf").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="no GGUF file"):
        read_control_vector(tmp_path / "v.gguf")
