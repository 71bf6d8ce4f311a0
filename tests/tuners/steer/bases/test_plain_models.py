"""PyTorch models without a transformers configuration: blocks in a list or a sequence, tensors or tuples."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import randomize, reference_delta, steer_layers
from torch import nn

from peft_steer import SteerConfig


class Block(nn.Module):
    def __init__(self, d: int, norm: bool, returns: str):
        super().__init__()
        self.norm = nn.LayerNorm(d) if norm else nn.Identity()
        self.up, self.down, self.returns = nn.Linear(d, 3 * d), nn.Linear(3 * d, d), returns

    def forward(self, x):
        h = x[0] if isinstance(x, tuple) else x
        h = h + self.down(torch.relu(self.up(self.norm(h))))
        return h if self.returns == "tensor" else (h, None)


class Plain(nn.Module):
    def __init__(self, container=nn.ModuleList, norm: bool = True, returns: str = "tensor", d: int = 12):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(7, d)
        blocks = [Block(d, norm, returns) for _ in range(3)]
        self.blocks = container(blocks) if container is nn.ModuleList else container(*blocks)
        self.head = nn.Linear(d, 2)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x[0] if isinstance(x, tuple) else x)


x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("returns", ["tensor", "tuple"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("container", [nn.ModuleList, nn.Sequential])
def test_found_steered_trained_and_saved(tmp_path, container, norm, returns):
    make = lambda: Plain(container, norm, returns).eval()  # noqa: E731
    model = get_peft_model(make(), SteerConfig(kind="nonlinear", r=4))
    assert model.peft_config["default"].hidden_size == 12
    assert list(steer_layers(model)) == [f"base_model.model.blocks.{i}" for i in range(3)]
    assert torch.equal(model(x), make()(x))
    model(x).square().sum().backward()
    randomize(model, std=0.5)
    base, h = make(), None
    with torch.no_grad():
        h = base.embed(x)
        for block, layer in zip(base.blocks, steer_layers(model).values(), strict=True):
            h = block(h)[0] if returns == "tuple" else block(h)
            h = h + reference_delta(layer.steer_edit["default"], h).float()
        torch.testing.assert_close(model(x), base.head(h), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(make(), tmp_path)(x), model(x))
    with pytest.raises(ValueError, match="The adapter was made for a model with hidden_size=12"):
        PeftModel.from_pretrained(Plain(container, norm, returns, d=16), tmp_path)


def test_a_width_that_cannot_be_told_can_be_given():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Bilinear(12, 12, 12)

        def forward(self, x):
            return x + self.inner(x, x)

    def make():
        model = Plain()
        model.blocks = nn.ModuleList([Odd() for _ in range(2)])
        return model

    with pytest.raises(ValueError, match=r"The hidden size of Plain at 'blocks\.0' is unknown.*Set `hidden_size`"):
        get_peft_model(make(), SteerConfig(r=2))
    model = get_peft_model(make(), SteerConfig(r=2, hidden_size=12))
    randomize(model, std=0.5)
    assert not torch.allclose(model(x), model.unload()(x))
