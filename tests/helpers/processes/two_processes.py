"""What each of two processes does in the tests of training under DDP and FSDP2."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict
from tiny import inputs, steer_layers
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from peft_steer import orthogonality


STEPS = 4


def run(models: dict[str, Callable[[], PeftModel]], out: Path) -> dict[tuple[str, str], tuple]:
    """What `train` writes, by the model's name and the kind of parallelism."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{s.getsockname()[1]}"
    torch.multiprocessing.spawn(train, args=(address, models, str(out)), nprocs=2)
    return torch.load(out, weights_only=True)


def train(rank: int, address: str, models: dict[str, Callable[[], PeftModel]], out: str) -> None:
    """Train every model under DDP and FSDP2; rank 0 writes the results to `out`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    results = {}
    for mode, make in models.items():
        for kind in ("ddp", "fsdp2"):
            results[mode, kind] = _train(rank, kind, make().train())
    if rank == 0:
        torch.save(results, out)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # see peft_steer/bench/run/child.py: freeing a Gloo group at exit may hang


def _train(rank: int, kind: str, adapted: PeftModel) -> tuple[list[float], dict[str, torch.Tensor]]:
    edits = [layer.steer_edit["default"] for layer in steer_layers(adapted.get_base_model()).values()]
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (2,))
        for block in adapted.get_base_model().model.layers:
            fully_shard(block, mesh=mesh)
        wrapped = fully_shard(adapted, mesh=mesh)
        assert all(
            isinstance(p, DTensor)
            for edit in edits
            for p in (*edit.parameters(), *([edit.B] if hasattr(edit, "B") else []))
        )
    else:
        wrapped = DistributedDataParallel(adapted)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    batch = {name: x[2 * rank : 2 * rank + 2] for name, x in inputs(rows=4).items()}
    overlaps = []
    for _ in range(STEPS):
        wrapped(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if any(hasattr(edit, "B") for edit in edits):
            overlaps.append(max(orthogonality(adapted).values()))
    state = adapted.state_dict()
    if kind == "fsdp2":
        state = get_model_state_dict(adapted, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank:
        return overlaps, {}
    return overlaps, {name: x.clone() for name, x in get_peft_model_state_dict(adapted, state_dict=state).items()}
