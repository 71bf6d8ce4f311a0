"""A vLLM server that follows a model in training (TRL's `vllm_mode="server"`).

The server is started with a saved adapter, which may be untrained: it gives the places and the shapes of the edits.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{"backend": "nccl"}' \\
        --additional-config '{"peft_steer": {"adapter": "DIR"}}'

    trainer = GRPOTrainer(..., args=GRPOConfig(use_vllm=True, vllm_mode="server"))
    follower = follow_server(trainer.model, trainer.vllm_generation.vllm_client)
    trainer.train()
"""

from typing import Any, cast

from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner

from peft_steer.tuners.steer import following

from .options import KEPT


def follow_server(model: PeftModel, client: Any) -> following.Follower:
    """Have the server behind `client` follow `model`: from now on a synchronization pushes the edits.

    Args:
        model: the model in training.
        client: TRL's `VLLMClient`, or anything whose `get_server_info()` returns the server's configuration.

    Returns:
        What the model knows of the server. The server is followed for as long as this object lives; keep it.

    Raises:
        ValueError: if the server does not steer, or an adapter of another structure.
    """
    asked = (client.get_server_info().get("additional_config") or {}).get("peft_steer") or {}
    layout = asked.get("layout")
    if layout is None:
        raise ValueError(
            "The vLLM server does not steer. Save the adapter, and start the server with "
            '--additional-config \'{"peft_steer": {"adapter": "DIR"}}\', where peft-steer is installed.'
        )
    tuner = cast(BaseTuner, model.base_model)
    forms = following.forms(tuner)
    config = model.peft_config[model.active_adapter]
    mine = {name: list(x.shape) for name, x in get_peft_model_state_dict(model).items()}
    if mine != layout["tensors"]:
        name = min(name for name in mine | layout["tensors"] if mine.get(name) != layout["tensors"].get(name))
        raise ValueError(
            f"The vLLM server steers as {asked['adapter']!r}, whose structure differs from that of the model in "
            f"training, such as at {name!r}. Save this model's adapter and start the server with it."
        )
    for field in KEPT:
        if getattr(config, field) != layout["config"][field]:
            raise ValueError(
                f"The vLLM server steers with {field}={layout['config'][field]!r}, the model in training has "
                f"{getattr(config, field)!r}. Save this model's adapter and start the server with it."
            )
    names = {(module, letter) for module, form in forms.items() for letter in form.tensors()}
    follower = following.Follower(names, here=False)
    following.follow(tuner, follower)
    return follower
