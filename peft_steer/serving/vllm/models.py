"""The edits of one model of vLLM: put in where the engine was asked to steer, and written when weights arrive."""

import logging
import re
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import nn

from peft_steer.interventions.low_rank_form import LowRankForm
from peft_steer.tuners.steer import following
from peft_steer_vllm import options

from . import private
from .adapters import read
from .layers import Edit, RequestEdit
from .options import check_engine
from .places import CHILD, Places
from .requests import open_slots


logger = logging.getLogger(__name__)

_LIVE = re.compile(rf"(.*)\.{CHILD}\.{following.PREFIX}(A|B|c|v)")


def steer(model: nn.Module, config: Any) -> "Steering | None":
    """Put in what `config` asks for; None if it asks for nothing and no model in training is to be followed.

    Args:
        model: of a class that `peft_steer_vllm.py` made, without weights yet.
        config: its `VllmConfig`.
    """
    asked = options(config)
    if asked is None:
        return _follow(model, config)
    steering = Steering(model, config)
    if "sites" in asked:
        steering.open_sites(asked["sites"])
        return steering
    directory = asked["adapter"]
    adapter = read(directory, asked.get("scale", 1.0))
    if adapter.lora:
        raise ValueError(
            f"{directory!r} has a LoRA half: serve it per request, with additional_config "
            '{"peft_steer": {"sites": ["block"]}} and enable_lora=True.'
        )
    if adapter.positions != "all":
        raise ValueError(
            f"{directory!r}: positions={adapter.positions!r}: serve it per request, with additional_config "
            '{"peft_steer": {"sites": [...]}}, enable_lora=True and enable_prefix_caching=False.'
        )
    adapter.check_fits(repr(directory), steering.hidden_size, steering.num_blocks)
    steering.put(adapter.forms)
    for name, form in adapter.forms.items():
        for letter, x in form.tensors().items():
            steering.edits[name].write(letter, x)
    return steering


def _follow(model: nn.Module, config: Any) -> "Steering | None":
    """An engine in the process of a training steers as the model in training does, once that was pushed."""
    tuner = following.in_training(config.model_config.model)
    if tuner is None:
        return None
    steering = Steering(model, config)
    try:
        forms = following.forms(tuner)
        check_engine(config)
        if config.model_config.enable_sleep_mode:
            raise ValueError("sleep mode discards the weights of the base, which is not pushed again.")
        steering.put(forms)
    except ValueError as error:  # no fault of an engine that is here for something else: merging then raises
        logger.warning("This engine does not follow the steered model in training: %s", error)
        return None
    # The key of vLLM's compile cache has this dictionary in it, and the graph has the shapes of the edits in it.
    config.additional_config["peft_steer_following"] = {
        name: [form.activations, sorted(form.tensors())] for name, form in forms.items()
    }
    names = {(name, letter) for name, form in forms.items() for letter in form.tensors()}
    steering.follower = following.Follower(names)
    following.follow(tuner, steering.follower)
    if config.device_config.device_type == "cpu":
        private.keep_plain_weights(model)
    return steering


class Steering:
    """The edits of a model.

    Attributes:
        edits: by transformers' name of the steered module.
        sites: those that are open to an adapter per request.
        follower: what the trainer knows of this engine, if it follows one.
    """

    def __init__(self, model: nn.Module, config: Any):
        hf = config.model_config.hf_text_config
        self.hidden_size, self.num_blocks = hf.hidden_size, hf.num_hidden_layers
        self.prefix_caching = bool(config.cache_config.enable_prefix_caching)
        self.places = Places(model, cast(Any, model).peft_steer_architecture)
        self.edits: dict[str, Edit] = {}
        self.sites: list[str] = []
        self.follower: following.Follower | None = None
        self._device, self._dtype = config.device_config.device, config.model_config.dtype
        self._loaded = False

    def open_sites(self, sites: list[str]) -> None:
        """Slots at every place of these sites."""
        self.sites = sites
        open_slots()
        for site in sites:
            for name in self.places.of_site(site):
                edit = RequestEdit(self.hidden_size, f"{name}.{CHILD}")
                edit.device = self._device
                self.places.put(name, edit)

    def put(self, forms: dict[str, LowRankForm]) -> None:
        """An edit of these shapes, zero yet, at each module."""
        known = self.places.known()
        for name, form in forms.items():
            place = self.places.name(name)
            if place not in known:
                raise ValueError(f"vLLM's {type(self.places.model).__name__} has no place for an edit at {name!r}.")
            with torch.device(self._device):
                self.edits[name] = Edit(self.hidden_size, form).to(self._dtype)
            self.places.put(place, self.edits[name])

    def receive(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Takes the edits out of `weights`, and, from an engine that has its base, what would not change it."""
        frozen = self._loaded and self.follower is not None and self.follower.frozen_base
        for name, x in weights:
            live = _LIVE.fullmatch(name)
            if live is None:
                if not frozen:
                    yield name, x
                continue
            module, letter = live.groups()
            if module not in self.edits:
                raise ValueError(f"The engine has no edit at {module!r}, and was given one.")
            self.edits[module].write(letter, x)
            if self.follower is not None:
                self.follower.received.add((module, letter))
        self._loaded = True
