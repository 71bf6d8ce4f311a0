"""Inference engines that follow a model in training: they run its adapter, and take it from its parameters.

Trainers synchronize an engine by `merge_adapter()`, `named_parameters()`, `unmerge_adapter()`. Most edits do not
merge. So, for a model that an engine follows, merging shows the edits as parameters of their own, in the form that the
engine runs, and unmerging takes them away again; the base is not touched.
"""

import gc
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from torch.distributed.tensor import DTensor

from peft_steer.interventions.low_rank_form import LowRankForm

from .layer import SteerLayer


# In the names of the parameters that are shown. It has neither tuner's prefix in it, by which trainers leave out what
# belongs to an adapter.
PREFIX = "live_"
TUNERS: "weakref.WeakSet[BaseTuner]" = weakref.WeakSet()  # of all steered models in this process


class Follower:
    """An engine, as the model that it follows knows it.

    Args:
        names: what it takes, as (steered module, tensor of its form).
        here: whether it is in this process, so that what it received can be told.

    Attributes:
        received: the names that it received since the last merge.
        frozen_base: whether the base's weights are the ones that it loaded.
    """

    def __init__(self, names: set[tuple[str, str]], here: bool = True):
        self.names, self.here = names, here
        self.received: set[tuple[str, str]] = set()
        self.frozen_base = False


_followers: "weakref.WeakKeyDictionary[BaseTuner, weakref.WeakSet[Follower]]" = weakref.WeakKeyDictionary()


def follow(tuner: BaseTuner, follower: Follower) -> None:
    """From now on merging `tuner` shows its edits to `follower`, for as long as that is alive."""
    _followers.setdefault(tuner, weakref.WeakSet()).add(follower)


def followers(tuner: BaseTuner) -> list[Follower]:
    """The engines that follow `tuner`."""
    return list(_followers.get(tuner, ()))


def in_training(path: str) -> BaseTuner | None:
    """The one steered model in this process that was loaded from `path` and has edits to train; None if there are
    several, since an engine could not tell whose to run."""
    if len(found := _in_training(path)) > 1:
        gc.collect()  # trainers are in cycles, and may be gone
        found = _in_training(path)
    return found[0] if len(found) == 1 else None


def _in_training(path: str | None) -> list[BaseTuner]:
    named = [tuner for tuner in TUNERS if getattr(tuner.model, "name_or_path", None) == path]
    return [t for t in named if any(p.requires_grad for layer in layers(t).values() for p in layer.parameters())]


def layers(tuner: BaseTuner) -> dict[str, SteerLayer]:
    """The steering layers, by the name of the module that they steer."""
    return {name.rpartition(".")[0]: m for name, m in tuner.model.named_modules() if isinstance(m, SteerLayer)}


def forms(tuner: BaseTuner) -> dict[str, LowRankForm]:
    """What acts at each steered module, at its present strength.

    Raises:
        ValueError: if an engine could not run it.
    """
    found = {}
    for module, layer in layers(tuner).items():
        names = [name for name in layer.active_adapters if name in layer.steer_edit]
        if len(names) != 1 or layer.disable_adapters:
            raise ValueError(f"An engine runs one adapter of a model in training; active at {module!r}: {names}.")
        parameters = list(layer.steer_edit[names[0]].parameters())
        if layer.positions[names[0]] != "all":
            raise ValueError(
                f"positions={layer.positions[names[0]]!r}: an engine that follows a training steers all tokens. Use "
                "transformers' generation (use_vllm=False)."
            )
        if any(isinstance(p, DTensor) for p in parameters):
            raise ValueError("An engine cannot follow edits that FSDP2 has taken apart. Use DDP, or use_vllm=False.")
        edit = layer.shared_edit(names[0])
        form = edit.low_rank(layer.strength(names[0]))
        if form is None:
            raise ValueError(
                f"No engine runs the edit at {module!r} ({type(edit).__name__}). Use transformers' generation "
                "(use_vllm=False)."
            )
        found[module] = form
    return found


def publish(tuner: BaseTuner) -> None:
    """Show the edits as parameters `<module>.steering.live_A` and so on, and merge the LoRA half, if there is one.

    A synchronization that was broken off is begun again.
    """
    withdraw(tuner)
    base = [p for name, p in tuner.model.named_parameters() if tuner.prefix not in name]
    lora = [m for m in tuner.model.modules() if isinstance(m, LoraLayer)]
    frozen = not lora and not any(p.requires_grad for p in base)
    shown = forms(tuner)
    for follower in followers(tuner):
        follower.received.clear()
        follower.frozen_base = frozen
    for module, layer in layers(tuner).items():
        for letter, x in shown[module].tensors().items():
            layer.register_parameter(PREFIX + letter, nn.Parameter(x, requires_grad=False))
    for m in lora:
        m.merge()


def published(tuner: BaseTuner) -> bool:
    """Whether the edits are shown at present."""
    return any(name.startswith(PREFIX) for layer in layers(tuner).values() for name in layer._parameters)


def withdraw(tuner: BaseTuner) -> None:
    """Take away what `publish` put there, if it did."""
    if not published(tuner):
        return
    for layer in layers(tuner).values():
        for name in [name for name in layer._parameters if name.startswith(PREFIX)]:
            del layer._parameters[name]
    for module in tuner.model.modules():
        if isinstance(module, LoraLayer):
            module.unmerge()


def finish(tuner: BaseTuner) -> bool:
    """Withdraw what was published; returns whether anything was.

    Raises:
        RuntimeError: if an engine in this process did not receive every edit of it.
    """
    if not published(tuner):
        return False
    withdraw(tuner)
    for follower in followers(tuner):
        if follower.here and (missing := follower.names - follower.received):
            module, letter = min(missing)
            raise RuntimeError(
                f"{len(missing)} of {len(follower.names)} tensors of the edits did not reach the engine, such as "
                f"{letter} at {module!r}: its rollouts would not come from the adapter. Which version of TRL is this?"
            )
    return True


def pushed_by_trl() -> bool:
    """Whether who called the caller of this function is TRL: it merges to push the base's parameters to vLLM, and for
    no other purpose."""
    name: str = sys._getframe(2).f_globals.get("__name__", "")
    return name.partition(".")[0] == "trl"


@contextmanager
def explaining(tuner: BaseTuner, pushed: bool) -> Iterator[None]:
    """If `pushed`, what a merge raises says why there are no rollouts by vLLM and what to do."""
    try:
        yield
    except ValueError as error:
        if pushed:
            raise ValueError(f"{error} {_why_not_followed(tuner)}") from error
        raise


def _why_not_followed(tuner: BaseTuner) -> str:
    path = getattr(tuner.model, "name_or_path", None)
    several = len(_in_training(path)) > 1
    return (
        "No vLLM engine follows this model, so its rollouts would come from the base. "
        + (f"There are several steered models of {path!r} in this process: delete the others. " if several else "")
        + "With vllm_mode='colocate' an engine follows by itself if its architecture is in `peft_steer_vllm.py` and "
        "it runs the edit; its log says why not. For vllm_mode='server' see `serving.vllm.live.follow_server`. Or "
        "set use_vllm=False."
    )
