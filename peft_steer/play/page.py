"""The page, by gradio. It asks nothing of any other machine: no fonts, no statistics."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from .render import as_code, coloured
from .session import Sampling, Session, Settings


_EMPTY = ("", "", "", "")


def make_page(session: Session) -> gr.Blocks:
    """The page of a session."""
    names, blocks = list(session.source.adapters), sorted(set(session.blocks.values()))
    has_template = session.tokenizer.chat_template is not None
    with gr.Blocks(title="peft-steer play", analytics_enabled=False) as page:
        gr.Markdown(f"## {session.source.model}, with and without steering")
        with gr.Row():
            with gr.Column(scale=3):
                prompt = gr.Textbox(
                    label="Prompt", lines=5, elem_id="prompt", placeholder="What the model goes on from"
                )
                with gr.Row():
                    tokens = gr.Slider(1, 512, value=60, step=1, label="New tokens", elem_id="tokens-new")
                    temperature = gr.Slider(0, 2, value=0, step=0.05, label="Temperature", elem_id="temperature")
                with gr.Row():
                    chat = gr.Checkbox(has_template, label="Chat template", interactive=has_template, elem_id="chat")
                    seed = gr.Number(0, label="Seed (of both texts)", precision=0, elem_id="seed")
            with gr.Column(scale=2):
                scale = gr.Slider(
                    -4, 4, value=1, step=0.05, label="Strength", info="0 is the base", elem_id="strength"
                )
                adapters = gr.CheckboxGroup(
                    names, value=names[:1], label="Adapters (several add up)", elem_id="adapters"
                )
                where = gr.Textbox(
                    "all", label="Blocks that steer", info=f"all, or for example {_example(blocks)}", elem_id="blocks"
                )
        button = gr.Button("Generate", variant="primary", elem_id="generate")
        with gr.Row():
            base = gr.Textbox(label="Base", lines=6, interactive=False, elem_id="base")
            steered = gr.Textbox(label="Steered", lines=6, interactive=False, elem_id="steered")
        gr.Markdown("**Where the steered model leaves the base**, token by token of the steered text")
        html = gr.HTML(elem_id="divergence")
        with gr.Accordion("The steered text as code", open=False):
            code = gr.Code(language="python", interactive=False, elem_id="code")
        memory: dict = {}  # the base's last text, which the slider does not change
        inputs = [prompt, chat, adapters, scale, where, tokens, temperature, seed]
        shared: dict[str, Any] = {
            "inputs": inputs,
            "outputs": [base, steered, html, code],
            "show_progress": "minimal",
            "concurrency_limit": 1,
            "concurrency_id": "model",
            "trigger_mode": "always_last",
        }

        def answer(*values) -> Iterator[tuple[str, str, str, str]]:
            yield from respond(session, memory, *values)

        button.click(answer, **shared)
        scale.release(answer, **shared)
        for event in (adapters.change, prompt.submit, where.submit):
            event(answer, **shared)
    return page


def respond(
    session: Session,
    memory: dict,
    prompt: str,
    chat: bool,
    adapters: list[str],
    scale: float,
    blocks: str,
    max_new_tokens: float,
    temperature: float,
    seed: float,
) -> Iterator[tuple[str, str, str, str]]:
    """Base text, steered text, coloured tokens and code, as they grow."""
    settings = Settings(tuple(adapters), float(scale), blocks)
    sampling = Sampling(int(max_new_tokens), float(temperature), int(seed))
    yield _EMPTY
    try:
        ids = session.prompt_ids(prompt, chat)
        key = (prompt, chat, sampling)
        if memory.get("key") != key:
            with session.unsteered():
                for text, _ in session.generate(ids, sampling):
                    yield text, "", "", ""
            memory.update(key=key, text=text)
        plain = memory["text"]
        with session.steered(settings):
            for text, tokens in session.generate(ids, sampling):
                new = tokens
                yield plain, text, "", ""
        kls = session.divergence(ids, new, settings)
    except ValueError as error:  # what the user can put right
        raise gr.Error(str(error), print_exception=False) from error
    pieces = [session.tokenizer.decode([token]) for token in new]
    yield plain, text, coloured(pieces, kls), as_code(session, settings, sampling, prompt, chat)


def launch(session: Session, host: str, port: int | None, **kwargs) -> gr.Blocks:
    """Serves the page; only this machine reaches it unless `host` says otherwise."""
    fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    page = make_page(session)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        theme=gr.themes.Default(**fonts),
        footer_links=[],
        ssr_mode=False,
        **kwargs,
    )
    return page


def _example(blocks: list[int]) -> str:
    return f"{blocks[0]}-{blocks[len(blocks) // 2]}" if len(blocks) > 2 else str(blocks[0])
