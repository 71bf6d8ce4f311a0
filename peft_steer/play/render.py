"""What the page shows besides text: tokens coloured by divergence, and the settings as code."""

from html import escape

from .session import Sampling, Session, Settings, parse_blocks


_FULL = 2.0  # nats at which the colour is full


def coloured(pieces: list[str], kls: list[float]) -> str:
    """HTML of a text whose tokens are the darker, the further the steered model is from the base there."""
    if not pieces:
        return ""
    spans = [
        f'<span style="background: rgba(230, 97, 1, {min(kl / _FULL, 1) * 0.8:.2f})" title="{kl:.3f} nats">'
        f"{escape(piece)}</span>"
        for piece, kl in zip(pieces, kls, strict=True)
    ]
    mean = sum(kls) / len(kls)
    return (
        f'<div id="tokens" data-mean="{mean:.6f}" style="white-space: pre-wrap; line-height: 1.7">'
        f"{''.join(spans)}</div>"
        f'<p style="opacity: 0.7">KL(steered ‖ base) of what both expect in each place: {mean:.3f} nats on average, '
        f"{max(kls):.3f} at most. The colour is full at {_FULL:g} nats; a token shows its own when pointed at.</p>"
    )


def as_code(session: Session, settings: Settings, sampling: Sampling, prompt: str, chat: bool) -> str:
    """Python that does without the page what it shows as steered."""
    source = session.source
    lines = [
        "import torch",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer"
        + (", BitsAndBytesConfig" if "BitsAndBytes" in source.loading else ""),
        "",
        "import peft_steer  # registers the adapters' types",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({source.model!r}{source.loading})",
        f"tokenizer = AutoTokenizer.from_pretrained({source.model!r})",
    ]
    if settings.adapters:
        first, *others = settings.adapters
        folder = source.adapters[first]
        lines.append(f"model = PeftModel.from_pretrained(base, {folder!r}, adapter_name={first!r}).eval()")
        lines += [f"model.load_adapter({source.adapters[name]!r}, adapter_name={name!r})" for name in others]
        lines.append(f"model.base_model.set_adapter({list(settings.adapters)!r})  # their edits add up")
        lines += [f"model.base_model.set_scale({name!r}, {settings.scale!r})" for name in settings.adapters]
        lines += _switched_off(session, settings)
    else:
        lines.append("model = base.eval()")
    if chat:
        lines += [
            f'messages = [{{"role": "user", "content": {prompt!r}}}]',
            "text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)",
            'inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(base.device)',
        ]
    else:
        lines.append(f'inputs = tokenizer({prompt!r}, return_tensors="pt").to(base.device)')
    how = "do_sample=False"
    if sampling.temperature > 0:
        how = f"do_sample=True, temperature={sampling.temperature!r}, top_p=1.0, top_k=0"
    lines += [
        f"torch.manual_seed({sampling.seed})",
        f"ids = model.generate(**inputs, max_new_tokens={sampling.max_new_tokens}, {how})",
        "print(tokenizer.decode(ids[0, inputs.input_ids.shape[1]:], skip_special_tokens=True))",
    ]
    return "\n".join(lines)


def _switched_off(session: Session, settings: Settings) -> list[str]:
    kept = parse_blocks(settings.blocks, set(session.blocks.values()))
    off = [f"{module}.{layer.child}" for module, layer in session.layers() if session.blocks[module] not in kept]
    if not off:
        return []
    body = [f"    model.get_base_model().get_submodule(name).set_scale({name!r}, 0.0)" for name in settings.adapters]
    names = "".join(f"    {name!r},\n" for name in off)
    return [f"for name in (\n{names}):", *body]
