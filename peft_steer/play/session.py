"""A base with adapters, and what the page asks of them: texts from both, and how far they are apart."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TextIteratorStreamer

from peft_steer import JointSteerLoraConfig, JointSteerLoraModel, SteerConfig, SteerModel, needs_prompts
from peft_steer.tuners.steer.injection import resolve_sites
from peft_steer.tuners.steer.layer import SteerLayer


@dataclass(frozen=True)
class Settings:
    """What acts, and how.

    Attributes:
        adapters: Names of the adapters; several add up.
        scale: Their strength, as a factor of each one's own.
        blocks: The blocks where they steer, such as `"0-9, 14"`, or `"all"`. (LoRA of a joint adapter stays.)
    """

    adapters: tuple[str, ...]
    scale: float = 1.0
    blocks: str = "all"


@dataclass(frozen=True)
class Sampling:
    """How a text is generated: with temperature 0 the likeliest token each time."""

    max_new_tokens: int = 60
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Source:
    """Where the model and the adapters come from, to be written into code."""

    model: str
    adapters: dict[str, str]
    loading: str = ""  # further arguments of `from_pretrained`, as code


class Session:
    """A model with adapters of one type.

    Args:
        model: The model with all adapters loaded.
        tokenizer: Its tokenizer.
        source: Where they come from.
    """

    def __init__(self, model: PeftModel, tokenizer, source: Source):
        if not isinstance(model.base_model, (SteerModel, JointSteerLoraModel)):
            kind = model.active_peft_config.peft_type.value
            raise ValueError(f"--adapter: adapters of type {kind} have no steering strength; STEER ones can be played")
        self.model, self.tokenizer, self.source = model.eval(), tokenizer, source
        self.blocks = self._blocks()
        self._lock = threading.Lock()  # one model, one request

    def _blocks(self) -> dict[str, int]:
        """The block of every steered module, by the module's name."""
        base = self.model.get_base_model()
        blocks: dict[str, int] = {}
        for config in self.model.peft_config.values():
            steer = config.steer_config() if isinstance(config, JointSteerLoraConfig) else cast(SteerConfig, config)
            blocks |= {name: site.block.index for name, site in resolve_sites(base, steer).items()}
        return blocks

    # --- what acts

    @contextmanager
    def steered(self, settings: Settings) -> Iterator[None]:
        """Within it the model is steered as `settings` say; with no adapter it is the base.

        Raises:
            ValueError: If the blocks cannot be understood.
        """
        kept = parse_blocks(settings.blocks, set(self.blocks.values()))
        with self._lock:
            if not settings.adapters:
                with self.model.disable_adapter():
                    yield
                return
            tuner = cast(SteerModel | JointSteerLoraModel, self.model.base_model)
            tuner.set_adapter(list(settings.adapters))
            for name in settings.adapters:
                tuner.set_scale(name, settings.scale)
            for module, layer in self.layers():
                if self.blocks[module] not in kept:
                    for name in settings.adapters:
                        layer.set_scale(name, 0.0)
            yield

    @contextmanager
    def unsteered(self) -> Iterator[None]:
        """Within it the model is the base."""
        with self._lock, self.model.disable_adapter():
            yield

    def layers(self) -> Iterator[tuple[str, SteerLayer]]:
        """The steering layers, with the names of the modules that they steer."""
        for name, layer in self.model.get_base_model().named_modules():
            if isinstance(layer, SteerLayer):
                yield name.rpartition(".")[0], layer

    # --- texts

    def prompt_ids(self, prompt: str, chat: bool) -> torch.Tensor:
        """Token ids of a prompt, `(1, tokens)`; with `chat` it is a user's message in the chat template.

        Raises:
            ValueError: If there is no prompt, or no chat template.
        """
        if not prompt.strip():
            raise ValueError("Write a prompt first.")
        if not chat:
            ids = self.tokenizer(prompt).input_ids
        elif self.tokenizer.chat_template is None:
            raise ValueError("The model has no chat template; switch 'chat' off.")
        else:
            messages = [{"role": "user", "content": prompt}]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return torch.tensor([ids], device=self.model.device)

    def generate(self, prompt: torch.Tensor, sampling: Sampling) -> Iterator[tuple[str, list[int]]]:
        """The text so far, again and again, and at last with its token ids. Both sides draw from the same seed."""
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        result: dict = {}
        sampled: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if sampling.temperature > 0:
            sampled = {"do_sample": True, "temperature": sampling.temperature, "top_p": 1.0, "top_k": 0}

        def work() -> None:
            try:
                torch.manual_seed(sampling.seed)
                with torch.no_grad():
                    result["ids"] = self.model.generate(
                        input_ids=prompt,
                        attention_mask=torch.ones_like(prompt),
                        max_new_tokens=sampling.max_new_tokens,
                        pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                        streamer=streamer,
                        **sampled,
                    )[0, prompt.shape[1] :].tolist()
            except Exception as error:  # raised again below, in the thread that reads
                result["error"] = error
                streamer.end()

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        text = ""
        try:
            for piece in streamer:
                text += piece
                yield text, []
        finally:
            worker.join()  # also if the page stops listening: the next request must not find the model at work
        if "error" in result:
            raise result["error"]
        yield text, result["ids"]

    @torch.no_grad()
    def divergence(self, prompt: torch.Tensor, ids: list[int], settings: Settings) -> list[float]:
        """For each generated token, `KL(steered || base)` of what both expect in its place, in nats."""
        if not ids:
            return []
        whole = torch.cat([prompt, torch.tensor([ids], device=prompt.device)], 1)
        n = prompt.shape[1]
        with self.steered(settings):
            steered = self._log_probs(whole, n)
        with self.unsteered():
            base = self._log_probs(whole, n)
        return (steered.exp() * (steered - base)).sum(-1).clamp(min=0).tolist()

    def _log_probs(self, ids: torch.Tensor, n: int) -> torch.Tensor:
        where = {"prompt_lengths": [n]} if needs_prompts(self.model) else {}
        logits = self.model(input_ids=ids, use_cache=False, **where).logits[0, n - 1 : -1]
        return logits.float().log_softmax(-1)


def load(model: str, path: str, adapters: dict[str, str], dtype: str, bits: int | None) -> Session:
    """Loads a base from `path` and adapters by name; `model` is what the user calls it.

    Raises:
        ValueError: If the adapters are not of one type.
    """
    types = {name: PeftConfig.from_pretrained(folder).peft_type.value for name, folder in adapters.items()}
    if len(set(types.values())) > 1:
        raise ValueError(f"--adapter: adapters of one type can be on one page, and these are {types}")
    kwargs: dict[str, Any] = {"dtype": dtype}
    loading = f', dtype="{dtype}"'
    if bits:
        options = {f"load_in_{bits}bit": True} | ({"bnb_4bit_quant_type": "nf4"} if bits == 4 else {})
        kwargs["quantization_config"] = BitsAndBytesConfig(**options)
        loading += f", quantization_config=BitsAndBytesConfig({', '.join(f'{k}={v!r}' for k, v in options.items())})"
    base: Any = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    if torch.cuda.is_available() and not bits:
        base = base.to("cuda")
    (first, folder), *others = adapters.items()
    adapted = PeftModel.from_pretrained(base, folder, adapter_name=first)
    for name, folder in others:
        adapted.load_adapter(folder, adapter_name=name)
    return Session(adapted, AutoTokenizer.from_pretrained(path), Source(model, adapters, loading))


def parse_blocks(text: str, known: set[int]) -> set[int]:
    """`"0-3, 7"` as `{0, 1, 2, 3, 7}`; `"all"` as all of `known`.

    Raises:
        ValueError: If it is neither, or names a block that is not steered.
    """
    if text.strip().lower() == "all":
        return known
    chosen: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", part)
        if match is None:
            raise ValueError(f"Blocks: {part!r} is neither a number nor a range such as 4-9.")
        chosen |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    if chosen - known:
        raise ValueError(f"Blocks: {sorted(chosen - known)} are not steered; steered are {sorted(known)}.")
    return chosen
