"""The models that distil compares: the base with an adapter, and how far each is from the tuned model."""

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from peft_steer import SteerConfig
from peft_steer.cost.methods import share

from ..capture.steering import oracle
from ..inputs.pairs import Pair
from ..inputs.texts import Texts
from ..maths.distance import Distance
from .fitting import FittedBlock


def adapter_of(pair: Pair, blocks: list[FittedBlock], empty: bool = False) -> PeftModel:
    """The base, whose weights it shares, with these edits as a steering adapter; `empty` leaves them at `dh = 0`."""
    r = max(block.r for block in blocks)
    config = SteerConfig(
        site="block",
        kind="linear",
        use_bias=True,
        r=r,
        rank_pattern={block.name: block.r for block in blocks if block.r != r},
        target_modules=[block.name for block in blocks],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(share(pair.base), config)
    if not empty:
        weights = {
            f"base_model.model.{block.name}.steering.steer_edit.{name}": getattr(block.edit, name).float()
            for block in blocks
            for name in ("W_down", "W_up", "b")
        }
        unexpected = set_peft_model_state_dict(model, weights).unexpected_keys
        assert not unexpected, unexpected
    return model.eval()


@torch.no_grad()
def distances(pair: Pair, models: dict[str, nn.Module], texts: Texts) -> list[Distance]:
    """Each model's distance from the tuned one."""
    found = [Distance() for _ in models]
    for batch in texts.batches("Measuring"):
        reference = pair.tuned(**batch.inputs(pair.tuned)).logits
        for distance, model in zip(found, models.values(), strict=True):
            distance.add(batch, reference, model(**batch.inputs(model)).logits)
    return found


@torch.no_grad()
def out_of_reach(pair: Pair, texts: Texts) -> float:
    """The KL that is left on the first batch where every block's output is the tuned model's: what its own final norm
    and head do."""
    batch, found = next(iter(texts)), Distance()
    reference = pair.tuned(**batch.inputs(pair.tuned)).logits
    with oracle(pair.base, pair.tuned, ("block",)):
        found.add(batch, reference, pair.base(**batch.inputs(pair.base)).logits)
    return found.summary()["kl"]


def size_of(model: nn.Module) -> int:
    """Parameters of an adapter, or of a whole model."""
    if not isinstance(model, PeftModel):
        return model.num_parameters()
    return sum(tensor.numel() for tensor in get_peft_model_state_dict(model).values())
