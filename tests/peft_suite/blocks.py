"""A plain `nn.Module` with a stack of blocks, in place of the MLPs of PEFT's tests of custom models.

Those have no blocks; this model takes the same input, `X` of shape (batch, 10), and returns the same kind of output.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn

MODEL_ID = "MLP"
WIDTH = 16


class _Branch(nn.Module):
    def __init__(self, output: str):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.add_module(output, nn.Linear(WIDTH, WIDTH))
        self.output = output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule(self.output)(self.inner(x).relu())


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = _Branch("o_proj")
        self.self_attn.num_heads = 4
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = _Branch("down_proj")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(x)
        return x + self.mlp(self.norm(x))


class BlockModel(nn.Module):
    def __init__(self, bias: bool = True):
        super().__init__()
        self.lin0 = nn.Linear(10, WIDTH, bias=bias)
        self.layers = nn.ModuleList(_Block() for _ in range(3))
        self.lin1 = nn.Linear(WIDTH, 2, bias=bias)
        # Not on the model: PEFT's tests take a model with a `config` for one of transformers.
        for block in self.layers:
            block.config = SimpleNamespace(hidden_size=WIDTH)
        self.dtype = torch.float

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        """What a transformers model has too: an input to try the model on."""
        return {"X": torch.arange(30.0).view(3, 10)}

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        x = self.lin0(X.to(self.dtype))
        for block in self.layers:
            x = block(x)
        return self.lin1(x).log_softmax(dim=-1)


def stand_in(from_pretrained: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """`MockTransformerWrapper.from_pretrained` of PEFT's tests, with a `BlockModel` for its MLP."""

    def load(model_id: str, dtype: torch.dtype | None = None) -> nn.Module:
        if model_id != MODEL_ID:
            return from_pretrained(model_id, dtype)
        torch.manual_seed(0)
        model = BlockModel().to(dtype or torch.float32)
        model.dtype = dtype or torch.float32
        return model

    return load


def with_hidden_size(model_cls: type[nn.Module]) -> type[nn.Module]:
    """PEFT's `DeepMLP`, which has `layers`, with the width that a transformers model's configuration states."""

    class Deep(model_cls):
        def __init__(self, size: int = 10, **kwargs):
            super().__init__(size=size, **kwargs)
            for block in self.layers:
                block.config = SimpleNamespace(hidden_size=size)

    return Deep
