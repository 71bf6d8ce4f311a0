"""How an error in a block's output grows until the model's output: the Jacobian of what follows the block.

Steering blocks one after another leaves an error at each; the later blocks pass it on (arXiv 2603.00425, on the
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

from ..capture.steering import replaced


class Tail:
    """What follows each block, on one batch.

    Args:
        model: A decoder that returns `last_hidden_state`.
        blocks: Its blocks.
        inputs: Of its forward pass.
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
def _refusing() -> Iterator[None]:
    """Says of a part of a model that cannot be differentiated that it cannot."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if "setup_context" not in str(error) and "forward AD" not in str(error):
            raise
        raise ValueError(f"a part of the model has no derivative in forward mode: {error}") from error


@_refusing()
def gains(
    tail: Tail, i: int, mask: torch.Tensor, iterations: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The amplification of relative errors in the output of block `i`.

    Args:
        tail: The model on a batch.
        i: The block.
        mask: `(batch, length)`, true where there is a token.
        iterations: Of the power iteration on `J^T J`, at least 1.
        generator: For the random errors it starts from.

    Returns:
        `(largest, typical)`, each `(batch,)`, float64: the largest singular value of the relative Jacobian of each
        row, from below, and its root mean square over random errors, of which each row draws one.

    Raises:
        ValueError: If a part of the model has no derivative in forward mode (Bloom's activation).
    """
    h, function = tail.state(i), tail.after(i)
    out, back = vjp(function, h)
    present = mask[..., None].to(h.dtype)
    scale_in = h.norm(dim=-1, keepdim=True) * present
    scale_out = present / out.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(h.dtype).tiny)
    error = torch.randn(h.shape, generator=generator, dtype=torch.float32).to(h) * present
    largest = typical = None
    for step in range(iterations):
        error = error / _norm(error)
        response = jvp(function, (h,), (error * scale_in,))[1] * scale_out
        largest = _norm(response).flatten().double()
        if step == 0:
            typical = largest
        if step + 1 < iterations:
            error = back(response * scale_out)[0] * scale_in
    return largest, typical


def _norm(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).norm(dim=1)[:, None, None]
