"""Rollouts by vLLM: what no engine could follow is refused before anything is loaded, and that one does is checked."""

from importlib.util import find_spec

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from transformers import Trainer
from trl import GRPOConfig

from peft_steer import JointSteerLoraConfig, SteerConfig
from peft_steer.tuners.steer import following
from peft_steer.utils.errors import UsageError


_INSTEAD = "Remove `use_vllm`, or set `use_transformers_continuous_batching: true` in its place"


def check_rollouts(training: GRPOConfig, config: PeftConfig | None) -> None:
    """Raises a `UsageError`, which names the field, if vLLM's rollouts would not come from an adapter of `config`."""
    if not training.use_vllm:
        return
    if find_spec("vllm") is None:
        raise UsageError(f"use_vllm: vLLM is not installed. `pip install 'peft-steer[vllm]'`. {_INSTEAD}")
    if not isinstance(config, (SteerConfig, JointSteerLoraConfig)):
        return
    steer = config.steer_config() if isinstance(config, JointSteerLoraConfig) else config
    if training.vllm_mode == "server":
        raise UsageError(
            "vllm_mode: 'server' has to be told which model to follow, `peft_steer.serving.vllm.live.follow_server` "
            "in a script of your own. Set `vllm_mode: colocate`"
        )
    if "heads" in steer.sites:
        raise UsageError(f"site: vLLM does not steer {steer.site!r}, so its rollouts would be the base's. {_INSTEAD}")
    if steer.positions != "all":
        raise UsageError(
            f"positions: an engine that follows a training steers all tokens, not {steer.positions!r}. {_INSTEAD}"
        )
    if training.vllm_enable_sleep_mode:
        raise UsageError("vllm_enable_sleep_mode: the engine would lose its base, which is not pushed. Remove it")


def check_followed(trainer: Trainer) -> int:
    """The number of edits with which the engine of `trainer` follows its model; 0 if it has no engine.

    Raises:
        RuntimeError: if there is an engine, and it follows with another number of edits than there are in the model.
    """
    if not getattr(trainer.args, "use_vllm", False):
        return 0
    tuner = getattr(trainer.accelerator.unwrap_model(trainer.model), "base_model", None)
    if not isinstance(tuner, BaseTuner) or tuner not in following.TUNERS:
        return 0
    steered = set(following.layers(tuner))
    for follower in following.followers(tuner):
        if {module for module, _ in follower.names} == steered:
            return len(steered)
    raise RuntimeError(
        f"Pre-flight: {len(steered)} modules are steered, and no vLLM engine follows them; its log says why not. "
        f"{_INSTEAD}."
    )
