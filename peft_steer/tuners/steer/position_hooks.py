"""How the positions of a forward pass reach the layers: hooks on the model, and its `generate`.

Everything is a module-level function or class, so that a steered model can be copied and pickled.
"""

import inspect
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
from peft import PeftMixedModel, PeftModel
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from peft_steer.positions.layout import (
    Generation,
    cached_length,
    during_generation,
    of_call,
    of_whole_completions,
    of_whole_prompts,
)
from peft_steer.positions.spec import Layout, Selection

from .layer import SteerLayer, forget_layers, steered_layers


_TRACKER = "_steer_tracker"
_OURS = ("prompt_lengths", "completion_mask")  # arguments of forward that the model itself does not know


class _Tracker:
    """What is known about a model between its forward passes."""

    def __init__(self, model: nn.Module):
        self.generation: Generation | None = None  # while `generate` runs
        self.arguments = tuple(inspect.signature(model.forward).parameters)
        self.handles: list[RemovableHandle] = []


def track(model: nn.Module, positions: str) -> None:
    """Tell the layers in `model` which tokens each forward pass gives them, if `positions` needs it."""
    model = _innermost(model)
    if positions == "all" or hasattr(model, _TRACKER):
        return
    tracker = _Tracker(model)
    setattr(model, _TRACKER, tracker)
    _register(model, tracker, partial(_begin, tracker=tracker))
    encoder = _encoder(model)
    if encoder is not None:
        arguments = tuple(inspect.signature(encoder.forward).parameters)
        _register(encoder, tracker, partial(_begin_encoder, arguments=arguments))
    elif isinstance(model, GenerationMixin):
        vars(model)["generate"] = partial(_generate, model, tracker)


def needs_prompts(model: nn.Module) -> bool:
    """Whether an active adapter in `model` has `positions` that refer to the prompt: then a forward pass has to be
    told where it ends."""
    return any(layer.positions_in_use() for layer in steered_layers(model) if not layer.disable_adapters)


def untrack(model: nn.Module) -> None:
    """Undo [`track`]."""
    forget_layers(model)
    model = _innermost(model)
    if not hasattr(model, _TRACKER):
        return
    for handle in getattr(model, _TRACKER).handles:
        handle.remove()
    delattr(model, _TRACKER)
    vars(model).pop("generate", None)


def _innermost(model: nn.Module) -> nn.Module:
    """The model that `generate` calls, also where it has adapters of another `PeftModel`."""
    while isinstance(model, PeftModel | PeftMixedModel):
        model = model.get_base_model()
    return model


def check_stacks(model: nn.Module, positions: str, names: Iterable[str]) -> None:
    """Raise `ValueError` if a module to be steered would never see a token at `positions`: an encoder has the prompt
    alone, the decoder beside it the completion; a model that does not generate has no completion."""
    if positions == "completion" and not isinstance(_innermost(model), GenerationMixin):
        raise ValueError(
            f"`positions='completion'` has no token in {type(_innermost(model)).__name__}, which does not generate: "
            "everything is prompt. Choose other `positions`."
        )
    encoder = _encoder(model)
    if positions == "all" or encoder is None:
        return
    prefix = next(name for name, m in model.named_modules() if m is encoder)
    wrong = [name for name in names if name.startswith(f"{prefix}.") == (positions == "completion")]
    if wrong:
        raise ValueError(
            f"`positions={positions!r}` has no token at {wrong[0]!r}: in {type(model).__name__} the encoder has the "
            "prompt and the decoder the completion. Choose the blocks of one of them, such as "
            f"`target_modules=r'.*{'decoder' if positions == 'completion' else 'encoder'}.*\\.\\d+'`."
        )


def _register(module: nn.Module, tracker: _Tracker, begin: Callable[..., Any]) -> None:
    tracker.handles += [
        module.register_forward_pre_hook(begin, with_kwargs=True),
        module.register_forward_hook(_end, always_call=True),
    ]


def _encoder(model: nn.Module) -> nn.Module | None:
    """The encoder of a model that has a decoder beside it."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    encoder: nn.Module = cast(PreTrainedModel, model).get_encoder()
    return encoder


def _begin(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tracker: _Tracker
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    inputs = {**dict(zip(tracker.arguments, args, strict=False)), **kwargs}
    elsewhere: set[int] = set()
    encoder = _encoder(module)
    layout: Callable[[], Layout | None]
    if encoder is not None:
        layout = partial(of_whole_completions, inputs)
        elsewhere = {id(layer) for layer in steered_layers(encoder)}
    elif tracker.generation is not None:
        layout = partial(during_generation, inputs, cached_length(inputs.get("past_key_values")), tracker.generation)
    else:
        layout = partial(
            of_call, inputs, cached_length(inputs.get("past_key_values")), isinstance(module, GenerationMixin)
        )
    _hand_out(module, Selection(layout), elsewhere)
    return args, {name: x for name, x in kwargs.items() if name not in _OURS}


def _begin_encoder(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], arguments: tuple[str, ...]
) -> None:
    inputs = {**dict(zip(arguments, args, strict=False)), **kwargs}
    _hand_out(module, Selection(partial(of_whole_prompts, inputs)), set())


def _hand_out(module: nn.Module, selection: Selection, elsewhere: set[int]) -> None:
    layers = [layer for layer in steered_layers(module) if id(layer) not in elsewhere]
    for layer in layers:
        layer.selection = selection
    if torch.compiler.is_compiling():  # nothing may be cached later, inside a compiled checkpoint
        for positions in {p for layer in layers for p in layer.positions_in_use()}:
            selection.mask(positions)
    elif module.training and torch.is_grad_enabled():
        for m in module.modules():
            func = vars(m).get("_gradient_checkpointing_func")
            if func is not None and not isinstance(func, _Carrying):
                vars(m)["_gradient_checkpointing_func"] = _Carrying(func, m)


def _end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    for layer in steered_layers(module):
        layer.selection = None


class _Carrying:
    """A function for gradient checkpointing that recomputes with the positions of the pass that it recomputes: by then
    the model has forgotten them, or has run on other inputs."""

    def __init__(self, func: Callable[..., Any], module: nn.Module):
        self.func, self.module = func, module

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.func(function, *args, **kwargs)
        selections = [(layer, layer.selection) for layer in steered_layers(self.module)]
        return self.func(partial(_with_selections, selections, function), *args, **kwargs)


def _with_selections(
    selections: list[tuple[SteerLayer, Selection | None]], function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    before = [layer.selection for layer, _ in selections]
    for layer, selection in selections:
        layer.selection = selection
    try:
        return function(*args, **kwargs)
    finally:
        for (layer, _), earlier in zip(selections, before, strict=True):
            layer.selection = earlier


def _generate(
    model: GenerationMixin, tracker: _Tracker, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any
) -> Any:
    """`model.generate`, during which the model knows the prompt."""
    config: GenerationConfig = kwargs.get("generation_config") or model.generation_config
    _refuse(config, kwargs)
    x = kwargs.get("inputs_embeds")
    if x is None:
        x = kwargs.get("input_ids") if inputs is None else inputs
    if x is None:
        raise ValueError("`positions` refers to the prompt: pass `input_ids` or `inputs_embeds` to `generate`.")
    mask = kwargs.get("attention_mask")
    if mask is None:
        mask = _inferred_mask(config, x, kwargs)
    elif mask.ndim != 2:
        raise ValueError(
            "`positions` needs a two-dimensional `attention_mask` (batch, tokens), which shows the padding."
        )
    before, tracker.generation = tracker.generation, Generation(mask > 0)
    try:
        generate: Callable[..., Any] = type(model).generate
        return generate(model, inputs, *args, **kwargs)
    finally:
        tracker.generation = before


def _refuse(config: GenerationConfig, kwargs: dict[str, Any]) -> None:
    reasons = {
        "assistant_model": config.is_assistant
        and "an assistant model continues sequences whose prompt it cannot know",
        "guidance_scale": (kwargs.get("guidance_scale", config.guidance_scale) or 1) != 1
        and "classifier-free guidance runs the model on a second prompt",
        "cache_implementation": kwargs.get("cache_implementation", config.cache_implementation) == "paged"
        and "continuous batching flattens prompts and completions into one row",
    }
    for name, reason in reasons.items():
        if reason:
            raise ValueError(f"`{name}` cannot be used with `positions` other than 'all': {reason}.")


def _inferred_mask(config: GenerationConfig, x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """As `generate` infers it: padding is where the padding token is, unless that ends sequences too."""
    pad = kwargs.get("pad_token_id", config.pad_token_id)
    eos = kwargs.get("eos_token_id", config.eos_token_id)
    if x.ndim != 2 or pad is None or pad in (eos if isinstance(eos, list) else [eos]):
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return x.ne(pad)


def steered_positions(model: nn.Module) -> int:
    """How many positions (tokens of rows, padding included if it was edited) the adapters of `model` edited in its
    last forward pass, at one site or several. A compiled forward pass is not counted.

    Args:
        model: a model with adapters of this package, wrapped or not.

    Raises:
        ValueError: if it has none.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SteerLayer)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no steering adapter.")
    stacks: dict[str, torch.Tensor] = {}  # an encoder and a decoder have different tokens
    for name, layer in layers.items():
        mask = layer.steered
        if mask is None:
            continue
        key = re.split(r"\.\d+\.", name)[0]
        mask = mask.flatten()
        stacks[key] = stacks[key] | mask if key in stacks else mask
    return sum(int(mask.sum()) for mask in stacks.values())
