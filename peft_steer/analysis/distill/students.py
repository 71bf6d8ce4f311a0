"""The models that `peft-steer distill` compares: the base with an adapter, and its distance to the tuned model."""

from collections.abc import Mapping

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from peft_steer import SteerConfig
from peft_steer.cost.methods import share

from ..capture.steering import oracle
from ..inputs.pairs import Model, Pair
from ..inputs.texts import Texts
from ..maths.distance import Distance
from .fitting import FittedBlock


def adapter_of(pair: Pair, blocks: list[FittedBlock], empty: bool = False) -> PeftModel:
    """The base with these edits as a steering adapter; it shares the base's weights. `empty` leaves it at `dh = 0`."""
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
        unexpected = set_peft_model_state_dict(model, weights).unexpected_keys  # type: ignore[attr-defined]
        assert not unexpected, unexpected
    return model.eval()


@torch.no_grad()
def distances(pair: Pair, models: Mapping[str, Model], texts: Texts) -> list[Distance]:
    """Each model's distance to the tuned one."""
    measured = [Distance() for _ in models]
    for batch in texts.batches("Measuring"):
        reference = pair.tuned(**batch.inputs(pair.tuned)).logits
        for distance, model in zip(measured, models.values(), strict=True):
            distance.add(batch, reference, model(**batch.inputs(model)).logits)
    return measured


@torch.no_grad()
def out_of_reach(pair: Pair, texts: Texts) -> float:
    """The KL on the first batch when every block's output is the tuned model's: the part due to its final norm and
    head, which no edit of a block can follow."""
    batch, distance = next(iter(texts)), Distance()
    reference = pair.tuned(**batch.inputs(pair.tuned)).logits
    with oracle(pair.base, pair.tuned, ("block",)):
        distance.add(batch, reference, pair.base(**batch.inputs(pair.base)).logits)
    return distance.summary()["kl"]


def size_of(model: Model) -> int:
    """The number of an adapter's parameters, or of a whole model's."""
    if not isinstance(model, PeftModel):
        return model.num_parameters()
    return sum(tensor.numel() for tensor in get_peft_model_state_dict(model).values())
