"""The Jacobian of what follows a block: how an error in the block's output grows up to the model's output.

Steering blocks one after another leaves an error at each, which the later blocks pass on (arXiv 2603.00425, on the
growth of errors). With `h` the block's output, `(tokens, d)`, and `F(h)` the last hidden state, which the language
model head reads, an error `e` becomes `J e` to first order, `J = dF/dh`. Errors are relative, token by token: `e_t /
|h_t|` before and `(J e)_t / |F_t|` after, so that gains of blocks of different scale can be compared. `J` is never
built: `J e` is an exact JVP, `J^T e` a VJP.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.func import jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from peft_steer.sites import Block
from peft_steer.utils.errors import UsageError

from ..capture.steering import replaced


class Tail:
    """The part of a model after each block, on one batch.

    Args:
        model: A decoder that returns `last_hidden_state`.
        blocks: Its blocks.
        inputs: Keyword arguments of its forward pass.
    """

    def __init__(self, model: nn.Module, blocks: list[Block], inputs: dict):
        self.model, self.blocks, self.inputs = model, blocks, inputs
        self.outputs: list[torch.Tensor | tuple] = []
        handles = [
            block.module.register_forward_hook(lambda module, args, output: self.outputs.append(output))
            for block in blocks
        ]
        try:
            with torch.no_grad():
                model(**inputs)
        finally:
            for handle in handles:
                handle.remove()

    def state(self, i: int) -> torch.Tensor:
        """The output of block `i`, `(batch, length, d)`."""
        output = self.outputs[i]
        return output if isinstance(output, torch.Tensor) else output[0]

    def after(self, i: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """The function from the output of block `i` to the last hidden state, both `(batch, length, d)`."""

        def run(h: torch.Tensor) -> torch.Tensor:
            with ExitStack() as stack:
                for j in range(i + 1):
                    given = self.outputs[j] if j < i else self._as_output(i, h)
                    stack.enter_context(replaced(self.blocks[j].module, lambda *_, given=given, **__: given))
                # The fused attention kernels have no forward-mode derivative.
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
                return self.model(**self.inputs).last_hidden_state

        return run

    def _as_output(self, i: int, h: torch.Tensor) -> torch.Tensor | tuple:
        output = self.outputs[i]
        return h if isinstance(output, torch.Tensor) else (h, *output[1:])


@contextmanager
def _forward_mode_only() -> Iterator[None]:
    """Raises `UsageError` if a part of the model has no derivative in forward mode."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if "setup_context" not in str(error) and "forward AD" not in str(error):
            raise
        raise UsageError(f"a part of the model has no derivative in forward mode: {error}") from error


@_forward_mode_only()
def gains(
    tail: Tail, i: int, mask: torch.Tensor, iterations: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The amplification of relative errors in the output of block `i`.

    Args:
        tail: The model on a batch.
        i: The block.
        mask: `(batch, length)`, true where there is a token.
        iterations: Steps of the power iteration on `J^T J`, at least 1.
        generator: Draws the random errors that it starts from.

    Returns:
        `(largest, typical)`, each `(batch,)`, float64: of each row's relative Jacobian the largest singular value, a
        lower bound, and the gain of one random error, whose root mean square over rows is the typical gain.

    Raises:
        UsageError: If a part of the model has no derivative in forward mode (Bloom's activation).
    """
    h, function = tail.state(i), tail.after(i)
    out, back = vjp(function, h)  # type: ignore[misc]  # (three values with has_aux alone)
    present = mask[..., None].to(h.dtype)
    scale_in = h.norm(dim=-1, keepdim=True) * present
    scale_out = present / out.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(h.dtype).tiny)
    error = torch.randn(h.shape, generator=generator, dtype=torch.float32).to(h) * present

    def response(error: torch.Tensor) -> torch.Tensor:
        return jvp(function, (h,), (error * scale_in,))[1] * scale_out

    change = response(error / _norm(error))
    typical = _norm(change).flatten().double()
    for _ in range(iterations - 1):
        error = back(change * scale_out)[0] * scale_in
        change = response(error / _norm(error))
    return _norm(change).flatten().double(), typical


def _norm(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).norm(dim=1)[:, None, None]
