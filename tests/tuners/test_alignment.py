"""Where in memory the weights lie changes the last bits of a result, and nothing else."""

import copy

import pytest
import torch
from tiny import HEAD_KINDS, KINDS, adapted, assert_equal_but_for_rounding, logits, misaligned


CASES = {
    **{kind: {"kind": kind, **config} for kind, config in {**KINDS, **HEAD_KINDS}.items()},
    "joint": {"method": "joint"},
}


@pytest.mark.parametrize("case", CASES)
def test_misaligned_weights(case):
    model = adapted(**CASES[case])
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for x in (*moved.parameters(), *moved.buffers()):
            x.data = misaligned(x)
    assert any(p.data_ptr() % 64 for p in moved.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), moved.parameters(), strict=True))
    assert_equal_but_for_rounding(logits(moved), logits(model))
