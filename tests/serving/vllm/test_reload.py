"""vLLM's reload, layer by layer, by which a server takes a trainer's push: the edits outlive it, and arrive by it."""

import torch
import transformers as tf
from engines import difference, load, prompts, run_engine, save_adapter, save_model
from safetensors.torch import save_file

from peft_steer.serving.vllm.live import follow_server


class Client:
    """TRL's, of a server that was started with the adapter that the model has."""

    def __init__(self, model, adapter):
        from peft import get_peft_model_state_dict

        config = model.peft_config["default"]
        tensors = {name: list(x.shape) for name, x in get_peft_model_state_dict(model).items()}
        layout = {"tensors": tensors, "config": {n: getattr(config, n) for n in ("kind", "activation", "positions")}}
        self.asked = {"adapter": adapter, "layout": layout}

    def get_server_info(self):
        return {"additional_config": {"peft_steer": self.asked}}


def pushed(base: str, adapter: str) -> dict[str, torch.Tensor]:
    """What TRL pushes to a server that follows this model."""
    from accelerate import Accelerator
    from trl.distributed import DistributedBackend
    from trl.generation.vllm_generation import VLLMGeneration

    generation = object.__new__(VLLMGeneration)  # without an engine
    generation.model, generation._dist = load(base, adapter), DistributedBackend(Accelerator(cpu=True))
    follower = follow_server(generation.model, Client(generation.model, adapter))
    tensors = {name: x.clone() for name, x in generation._iter_named_params()}
    assert follower.names
    return tensors


def test_reloading(tmp_path):
    """Compiled: what is written must be what the graph reads."""
    base, other = save_model(tmp_path / "base"), str(tmp_path / "other")
    torch.manual_seed(7)
    tf.LlamaForCausalLM(tf.AutoConfig.from_pretrained(base)).save_pretrained(other)
    kind = {"kind": "noreft", "activation": "tanh", "scale": 0.8}
    first = save_adapter(base, tmp_path / "first", **kind)
    second = save_adapter(base, tmp_path / "second", seed=2, **kind)
    everything = pushed(other, second)
    edits = {name: x for name, x in pushed(base, second).items() if ".live_" in name}
    assert edits.keys() < everything.keys()
    assert len(edits) == 9  # A, B and c of each block
    save_file(edits, tmp_path / "edits.safetensors")
    save_file(everything, tmp_path / "everything.safetensors")

    requests = [[prompt, None] for prompt in prompts()]
    steps = {  # what is loaded, and the model that the engine runs then
        None: (base, first),
        str(tmp_path / "edits.safetensors"): (base, second),
        str(tmp_path / "everything.safetensors"): (other, second),
    }
    rounds = [requests]
    for file in steps:
        rounds += [{"reload": file}, requests]
    found = run_engine(
        tmp_path, base, rounds, additional_config={"peft_steer": {"adapter": first}}, enforce_eager=False
    )
    assert found["error"] is None, found["log"]
    for i, (model, adapter) in enumerate([(base, first), *steps.values()]):
        answers = found["rounds"][2 * i]
        assert difference(load(model, adapter), requests, answers) < 1e-4, i
        for control in {(base, None), (other, None), (base, first), (base, second)} - {(model, adapter)}:
            assert difference(load(*control), requests, answers) > 0.1, (i, control)
