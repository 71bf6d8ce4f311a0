"""Folding affine edits into the linear layer before or after them, and taking them out again."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_steer.interventions import Intervention


Linear = nn.Linear | Conv1D  # whose weight is transposed


class Folding(nn.Module):
    """What a [`SteerLayer`] does when it is merged. `plan.py` says where that is exact.

    The linear layer's own weight and bias are kept as buffers, so that they are copied, moved and cast with the model;
    no file has them.
    """

    merged_adapters: list[str]
    scaling: dict[str, float]
    at_input: bool
    own_weight: torch.Tensor
    own_bias: torch.Tensor | None
    _trained: bool
    _merged_into: tuple[Linear, ...] = ()  # the linear layer, in a tuple: not a submodule

    def shared_edit(self, adapter_name: str) -> Intervention:
        """The edit of an adapter that has one for all tokens."""
        raise NotImplementedError

    def merge_into(self, linear: Linear, adapter_names: list[str]) -> None:
        """Fold affine edits of `linear`'s output into it: `y + s (M y + v)` with `y = W x + b` is
        `(W + s M W) x + (b + s M b + s v)`. Those of its input, `x + s (M x + v)`: `(W + s W M) x + (b + s W v)`.

        Args:
            linear: with output (or input) width `d`.
            adapter_names: adapters of this layer whose edits are affine.
        """
        if not self._merged_into:
            self.register_buffer("own_weight", linear.weight.detach(), persistent=False)
            self.register_buffer("own_bias", None if linear.bias is None else linear.bias.detach(), persistent=False)
            self._merged_into, self._trained = (linear,), linear.weight.requires_grad
        weight, bias = self.own_weight, self.own_bias
        transposed = not isinstance(linear, nn.Linear)
        W = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        W = W.t() if transposed else W
        b = W.new_zeros(len(W)) if bias is None else bias.detach().to(W)
        new_W, new_b, has_bias = W.clone(), b.clone(), bias is not None
        for name in self.merged_adapters + adapter_names:
            affine = self.shared_edit(name).affine()
            if affine is None:
                raise ValueError(f"The edit of {name!r} is not affine and cannot be folded into a weight.")
            M, v = (x if x is None else x.detach().to(W) for x in affine)
            if M is not None:
                new_W += self.scaling[name] * (W @ M if self.at_input else M @ W)
                new_b += 0 if self.at_input else self.scaling[name] * (M @ b)
            if v is not None:
                new_b += self.scaling[name] * (W @ v if self.at_input else v)
                has_bias = True
        linear.weight = nn.Parameter(
            (new_W.t() if transposed else new_W).contiguous().to(weight.dtype), requires_grad=False
        )
        if has_bias:
            linear.register_parameter("bias", nn.Parameter(new_b.to(weight.dtype), requires_grad=False))
        self.merged_adapters = self.merged_adapters + adapter_names

    @property
    def merged_linear(self) -> Linear | None:
        """The linear layer that holds merged edits, if any."""
        return self._merged_into[0] if self._merged_into else None

    @property
    def merge_added_bias(self) -> bool:
        """Whether merging gave a bias to a linear layer that has none."""
        linear = self.merged_linear
        return linear is not None and self.own_bias is None and linear.bias is not None

    def unmerge(self) -> None:
        """Give the linear layer its own weight and bias back, bit for bit."""
        linear = self.merged_linear
        if linear is not None:
            linear.weight = nn.Parameter(self.own_weight, requires_grad=self._trained)
            bias = None if self.own_bias is None else nn.Parameter(self.own_bias, requires_grad=self._trained)
            linear.register_parameter("bias", bias)
            del self.own_weight, self.own_bias
        self._merged_into = ()
        self.merged_adapters = []
