"""Vectors of other tools: each file's own equation, written plainly, gives the imported adapter's logits."""

import pickle

import gguf
import pytest
import torch
from command_line import peft_steer
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


D, BLOCKS = 32, 2  # of `tiny_llama`


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def base_logits(model_dir, add=None, place=""):
    """The base's logits, with `add[block]` added to the output of a module of these blocks."""
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    for block, v in (add or {}).items():
        module = model.model.layers[block].get_submodule(place)

        def hook(module, args, output, v=v):
            return (output[0] + v, *output[1:]) if isinstance(output, tuple) else output + v

        module.register_forward_hook(hook)
    with torch.no_grad():
        return model(torch.arange(3, 30)[None]).logits


def adapter_logits(model_dir, folder):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), folder).eval()
    with torch.no_grad():
        return model(torch.arange(3, 30)[None]).logits


def check(model_dir, folder, add, place=""):
    expected = base_logits(model_dir, add, place)
    torch.testing.assert_close(adapter_logits(model_dir, folder), expected, atol=1e-6, rtol=0)
    assert (expected - base_logits(model_dir)).abs().max() > 0.1  # the control


def write_gguf(path, tensors):
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(tensors))
    for block, v in tensors.items():
        writer.add_tensor(f"direction.{block}", v.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_control_vector(tiny_llama, tmp_path):
    v = random(D)
    write_gguf(tmp_path / "v.gguf", {1: v})
    assert peft_steer("import", tmp_path / "v.gguf", "-o", tmp_path / "a", "--base", tiny_llama) == 0
    check(tiny_llama, tmp_path / "a", {1: v})


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_export_import_export_is_bit_equal(scale, tiny_llama, tmp_path):
    write_gguf(tmp_path / "v.gguf", {1: random(D)})
    into = [str(tmp_path / "v.gguf"), "-o", str(tmp_path / "a"), "--base", tiny_llama, "--scale", str(scale)]
    assert peft_steer("import", *into) == 0
    assert peft_steer("export", tmp_path / "a", "--format", "gguf-vector", "-o", tmp_path / "1.gguf") == 0
    assert peft_steer("import", tmp_path / "1.gguf", "-o", tmp_path / "b", "--base", tiny_llama) == 0
    assert peft_steer("export", tmp_path / "b", "--format", "gguf-vector", "-o", tmp_path / "2.gguf") == 0
    first, second = ((tmp_path / f"{n}.gguf").read_bytes() for n in (1, 2))
    assert first == second
    assert (first == (tmp_path / "v.gguf").read_bytes()) is (scale == 1)


# what the tool saves; flags; what it adds at which block's output
HOTWIRE = random(BLOCKS, D, seed=1)
VECTOR = random(D, seed=2)
FILES = {
    "hotwire": (HOTWIRE, [], dict(enumerate(HOTWIRE))),
    "hotwire_dict": ({"happy": HOTWIRE}, [], dict(enumerate(HOTWIRE))),
    "hotwire_one_block": (HOTWIRE * torch.tensor([[0.0], [1.0]]), [], {1: HOTWIRE[1]}),
    "easysteer": (VECTOR, ["--layers", "0", "1"], {0: VECTOR, 1: VECTOR}),
    "easysteer_row": (VECTOR[None], ["--layers", "1"], {1: VECTOR}),
    "directions": ({1: VECTOR}, [], {1: VECTOR}),
    "half": (HOTWIRE.half(), [], dict(enumerate(HOTWIRE.half().float()))),
}


@pytest.mark.parametrize("name", FILES)
def test_tensors(name, tiny_llama, tmp_path):
    saved, flags, add = FILES[name]
    torch.save(saved, tmp_path / "v.pt")
    assert peft_steer("import", tmp_path / "v.pt", "-o", tmp_path / "a", "--base", tiny_llama, *flags) == 0
    check(tiny_llama, tmp_path / "a", add)


@pytest.mark.parametrize(("layer_type", "place"), [("decoder_block", ""), ("self_attn", "self_attn"), ("mlp", "mlp")])
def test_steering_vectors_state(layer_type, place, tiny_llama, tmp_path):
    torch.save({"layer_activations": {0: VECTOR, 1: -VECTOR}, "layer_type": layer_type}, tmp_path / "v.pt")
    assert peft_steer("import", tmp_path / "v.pt", "-o", tmp_path / "a", "--base", tiny_llama) == 0
    check(tiny_llama, tmp_path / "a", {0: VECTOR, 1: -VECTOR}, place)


def test_safetensors(tiny_llama, tmp_path):
    save_file({"1": VECTOR}, tmp_path / "v.safetensors")
    flags = ["--base", tiny_llama, "--site", "mlp"]
    assert peft_steer("import", tmp_path / "v.safetensors", "-o", tmp_path / "a", *flags) == 0
    check(tiny_llama, tmp_path / "a", {1: VECTOR}, "mlp")


class Evil:
    """What a pickle can do: it writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_nothing_is_unpickled(write, tiny_llama, tmp_path, capsys):
    write(Evil(tmp_path / "was_here"), tmp_path / "v.pt")
    assert peft_steer("import", tmp_path / "v.pt", "-o", tmp_path / "a", "--base", tiny_llama) == 2
    assert "would run code of the file" in capsys.readouterr().err
    assert not (tmp_path / "was_here").exists()
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("saved", "flags", "message"),
    [
        (random(BLOCKS, 16), [], "of width 16"),
        (random(3, D), [], "asks for [2]"),
        (random(D), [], "--layers"),
        (random(BLOCKS, D), ["--layers", "1"], "names 1 blocks"),
        ({1: VECTOR}, ["--layers", "1"], "the file says itself"),
        ({"a": VECTOR, "b": VECTOR}, [], "'a' is not the number of a block"),
        ({1: random(2, D)}, [], "block 1 has no vector"),
        ({1: VECTOR, 0: random(16)}, [], "different widths"),
        (torch.zeros(BLOCKS, D), [], "all rows are zero"),
        ([VECTOR], [], "no steering vectors: list"),
        (torch.arange(D), [], "no steering vectors"),
        ({"layer_activations": {0: VECTOR}, "layer_type": "input_layernorm"}, [], "no site for"),
        ({"layer_activations": {0: VECTOR}, "layer_type": "mlp"}, ["--site", "block"], "which is 'mlp'"),
        (random(BLOCKS, D), ["--positions", "f7+l7"], "it is for folders of pyreft's"),
    ],
)
def test_refused(saved, flags, message, tiny_llama, tmp_path, capsys):
    torch.save(saved, tmp_path / "v.pt")
    assert peft_steer("import", tmp_path / "v.pt", "-o", tmp_path / "a", "--base", tiny_llama, *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("content", [b"hello", b"", b"PK\x03\x04 cut off", bytes(range(256))])
@pytest.mark.parametrize("ending", ["pt", "bin", "safetensors", "gguf"])
def test_damaged_files(ending, content, tiny_llama, tmp_path, capsys):
    (tmp_path / f"v.{ending}").write_bytes(content)
    assert peft_steer("import", tmp_path / f"v.{ending}", "-o", tmp_path / "a", "--base", tiny_llama) == 2
    message = capsys.readouterr().err
    assert "no file of tensors" in message or "no GGUF file" in message
    assert not (tmp_path / "a").exists()


def test_direction_0_is_said(tiny_llama, tmp_path, capsys):
    """EasySteer writes and adds it; llama.cpp would refuse the whole file."""
    vectors = {0: random(D, seed=3), 1: random(D, seed=4)}
    write_gguf(tmp_path / "v.gguf", vectors)
    assert peft_steer("import", tmp_path / "v.gguf", "-o", tmp_path / "a", "--base", tiny_llama) == 0
    assert "direction.0" in capsys.readouterr().out
    check(tiny_llama, tmp_path / "a", vectors)


def test_an_unknown_base(tmp_path, capsys):
    write_gguf(tmp_path / "v.gguf", {1: random(D)})
    assert peft_steer("import", tmp_path / "v.gguf", "-o", tmp_path / "a", "--base", "no/such-model") == 2
    assert "--base: 'no/such-model' cannot be loaded" in capsys.readouterr().err


def test_unknown_files(tiny_llama, tmp_path, capsys):
    (tmp_path / "v.npz").touch()
    (tmp_path / "folder").mkdir()
    for source, message in {
        "v.npz": "the ending must be one of .gguf",
        "folder": "not one of pyreft's",
        "missing.pt": "there is no file or folder",
    }.items():
        assert peft_steer("import", tmp_path / source, "-o", tmp_path / "a", "--base", tiny_llama) == 2
        assert message in capsys.readouterr().err
    assert peft_steer("import", tmp_path / "v.npz", "-o", tmp_path / "folder", "--base", tiny_llama) == 2
    assert "exists; name another" in capsys.readouterr().err
