"""Checks an accelerator in one go, without a connection, and prints one table to paste.

    make gpu-check                            # or: python recipes/gpu_check.py
    python recipes/gpu_check.py --shape tiny  # seconds, on any machine

Random weights in the shape of Llama-3.2-1B on an accelerator, a small shape on a CPU. It exits with 1 if a check
fails. The docstring of each section below says what its rows mean.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from datasets import Dataset
from tabulate import tabulate
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from peft_steer import PostBlockSteerConfig
from peft_steer.cost import measure, saved_bytes
from peft_steer.cost.methods import FLOOR, PRESETS, adapt, share
from peft_steer.utils.bitsandbytes import keep_unpacked
from peft_steer.utils.devices import default_device, device_name, visibility_variable, visible_accelerators
from peft_steer_cli import main as peft_steer


HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SHAPES: dict[str, dict[str, int]] = {
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "small": {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, **HEADS},
    "tiny": {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, **HEADS},
}
METHODS = ("lora", "vector", "post_block_linear", "post_block", "loreft", "joint")
DEVICE = default_device()
ON_CPU = DEVICE.type == "cpu"


class Row(NamedTuple):
    check: str
    value: str
    wanted: str
    ok: bool


def exactness(folder: Path, tiny: bool) -> Iterator[Row]:
    """Each kind on a base in half precision and in nf4, against the same weights and adapter in fp32. The adapter's
    relative error in the logits may be no more than twice the base's own; and a new adapter changes no bit."""
    ids = _ids(folder, 2, 32)
    for precision in ("bfloat16", "nf4"):
        low, exact = _load(folder, precision), _load(folder, precision, exact=True)
        base, base_exact = _logits(low, ids), _logits(exact, ids)
        base_error = _distance(base, base_exact)
        for name in PRESETS:
            model, reference = adapt(low, name), adapt(exact, name)
            unchanged = torch.equal(_logits(model, ids), base)
            for each in (model, reference):
                _randomize(each)
            expected = _logits(reference, ids)
            error, effect = _distance(_logits(model, ids), expected), _distance(expected, base_exact)
            yield Row(
                f"{name} on {precision}, error against fp32",
                f"{error:.1e} (effect {effect:.1e}; {'exact' if unchanged else 'NOT exact'} at the start)",
                f"<= 2 x the base's {base_error:.1e}",
                unchanged and error <= 2 * base_error and effect > base_error,
            )


def cost(folder: Path, tiny: bool) -> Iterator[Row]:
    """Training steps and greedy decoding of a bf16 base, in turn: median ratios to the floor (which trains a vector in
    block 0) and to the base. "kept" is for backward, "peak" with weights and optimizer."""
    base = _load(folder, "bfloat16")
    rows, length, tokens, rounds = (2, 16, 4, 2) if tiny else (4, 64, 16, 3) if ON_CPU else (4, 512, 64, 5)
    ids = _ids(folder, rows, length)
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    batch["use_cache"] = False
    adapted = {"floor": adapt(base, FLOOR), **{name: adapt(base, name) for name in METHODS}}
    decoders_of: dict[str, Any] = {"base": share(base), **{n: m for n, m in adapted.items() if n != "floor"}}
    prompts = ids[:1, :8]
    decode = measure.interleaved_seconds(
        {name: measure.greedy_decoding(model, prompts, tokens) for name, model in decoders_of.items()},
        rounds, DEVICE, 0, "Decoding",
    )  # fmt: skip
    yield Row("base, ms to decode a token", f"{1e3 * statistics.median(decode['base']) / tokens:.2f}", "", True)
    for checkpointed in (False, True):
        label = ", checkpointed" if checkpointed else ""
        kept, peak = {}, {}
        for name, model in adapted.items():
            with measure.checkpointing(model, checkpointed):
                kept[name] = saved_bytes(model, batch)
                peak[name] = measure.step_peak(model, batch)
        with ExitStack() as stack:
            for model in adapted.values():
                stack.enter_context(measure.checkpointing(model, checkpointed))
            steps = {name: measure.training_step(model, batch) for name, model in adapted.items()}
            seconds = measure.interleaved_seconds(steps, rounds, DEVICE, 0, "Steps")
        yield Row(
            f"floor{label}",
            f"step {statistics.median(seconds['floor']):.3f} s, kept {kept['floor'] / 1e6:,.0f} MB, "
            f"peak {peak['floor'] / 1e6:,.0f} MB",
            "",
            True,
        )
        for name in METHODS:
            ratios = f"step {_ratio(seconds[name], seconds['floor']):.3f}, kept {kept[name] / kept['floor']:.3f}, "
            ratios += f"peak {peak[name] / peak['floor']:.3f}"
            if not checkpointed:
                ratios += f"; decode {_ratio(decode[name], decode['base']):.3f}"
            yield Row(f"{name}{label}, x floor (decode: x base)", ratios, "", True)


def compiled(folder: Path, tiny: bool) -> Iterator[Row]:
    """`torch.compile(fullgraph=True)`: the logits of the compiled model against the eager one's, without and with
    steering. On a CPU the graph is run by eager kernels, as there may be no compiler."""
    ids, backend = _ids(folder, 2, 32), "aot_eager" if ON_CPU else "inductor"
    base = _load(folder, "bfloat16")
    for name in ("base", "post_block", "loreft"):
        model = share(base) if name == "base" else adapt(base, name)
        _randomize(model)
        with torch.no_grad():
            output = torch.compile(model.eval(), fullgraph=True, backend=backend)(input_ids=ids, use_cache=False)
        error = _distance(output.logits, _logits(model, ids))
        yield Row(f"{name}, compiled ({backend}) against eager", f"{error:.1e}", "<= 1e-2", error <= 1e-2)


def training(folder: Path, tiny: bool) -> Iterator[Row]:
    """Two steps of TRL's SFT and GRPO on the bf16 base: the adapter changes, the base does not."""
    common: dict[str, Any] = {
        "max_steps": 2, "learning_rate": 1e-3, "report_to": "none", "use_cpu": ON_CPU, "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "bf16": not ON_CPU, "per_device_train_batch_size": 4,
    }  # fmt: skip
    config = PostBlockSteerConfig(task_type="CAUSAL_LM")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    sums = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(8) for b in range(8)]
    with tempfile.TemporaryDirectory() as output:
        sft = SFTTrainer(
            _load(folder, "bfloat16"), SFTConfig(output, **common), train_dataset=Dataset.from_list(sums),
            processing_class=tokenizer, peft_config=config,
        )  # fmt: skip
        yield _trained("SFT", sft)
        grpo = GRPOTrainer(
            _load(folder, "bfloat16"), _reward,
            GRPOConfig(output, num_generations=4, max_completion_length=8 if tiny else 32, **common),
            train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in sums]),
            processing_class=tokenizer, peft_config=config,
        )  # fmt: skip
        yield _trained("GRPO", grpo)


def distilling(folder: Path, tiny: bool) -> Iterator[Row]:
    """`peft-steer distill --train-steps 2` of a random LoRA: the adapter is nearer to it than the base."""
    with tempfile.TemporaryDirectory() as output:
        tuned = adapt(_load(folder, "bfloat16"), "lora")
        _randomize(tuned)
        tuned.save_pretrained(f"{output}/tuned")
        texts = Path(output) / "sums.csv"
        lines = [f"{a}+{b}=,is {a + b}\n" for a in range(12) for b in range(12)]
        texts.write_text("prompt,completion\n" + "".join(lines))
        words = ["--base", str(folder), "--tuned", f"{output}/tuned", "--dataset", str(texts), "--dtype", "bfloat16"]
        words += ["--num_texts", "100", "--train-steps", "2", "--output", f"{output}/distilled"]
        assert peft_steer(["distill", *words]) == 0
        result = json.loads((Path(output) / "distilled/distill.json").read_text())["models"]
    kl = {name: result[name]["kl"] for name in ("base", "distilled")}
    yield Row("distil, KL to the tuned model", f"{kl['distilled']:.2e}", f"< the base's {kl['base']:.2e}",
              kl["distilled"] < kl["base"])  # fmt: skip


SECTIONS = {
    "exactness": exactness, "cost": cost, "compile": compiled, "training": training, "distil": distilling,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs the sections and prints the table. Returns 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small" if ON_CPU else "1b", help="of the random model")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="these sections")
    args = parser.parse_args(argv)
    if len(visible_accelerators()) > 1:
        parser.error(f"several accelerators are visible; set {visibility_variable()}={visible_accelerators()[0]}")
    transformers.logging.set_verbosity_error()
    table, failed, start = [], 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        _make_model(Path(name), SHAPES[args.shape])
        for section in args.only:
            try:  # the sections are independent: one that fails must not hide what the others say
                for row in SECTIONS[section](Path(name), args.shape == "tiny"):
                    failed += not row.ok
                    table.append((section, *row[:3], "ok" if row.ok else "FAILED"))
            except Exception as error:
                traceback.print_exc()
                failed += 1
                table.append((section, "", f"{type(error).__name__}: {error}".splitlines()[0][:120], "", "FAILED"))
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "trl", "bitsandbytes")
    )
    no_gpu = " There is no accelerator here: times say nothing of one." if ON_CPU else ""
    shape = ", ".join(f"{value} {name}" for name, value in SHAPES[args.shape].items())
    print(f"{device_name(DEVICE)}; {versions}.{no_gpu}\nRandom Llama: {shape}. {time.perf_counter() - start:.0f} s.\n")
    print(tabulate(table, ("section", "check", "value", "wanted", ""), "github", disable_numparse=True))
    return 1 if failed else 0


def _make_model(folder: Path, shape: dict[str, int]) -> None:
    """A random model in bfloat16 with a byte tokenizer."""
    tokens = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    special: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **shape}
    with torch.device(DEVICE):
        config = LlamaConfig(**special, max_position_embeddings=1024, tie_word_embeddings=True)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def _load(folder: Path, precision: str, exact: bool = False) -> Any:
    """The frozen model on the device. `exact`: its weights, as rounded by that precision, in fp32."""
    kwargs: dict[str, Any] = {"dtype": torch.bfloat16}
    if precision == "nf4":
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        kwargs["device_map"] = {"": DEVICE}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    keep_unpacked(model)
    if precision != "nf4":
        model = model.to(DEVICE)
    elif exact:
        model = model.dequantize()
    return (model.float() if exact else model).eval().requires_grad_(False)


def _ids(folder: Path, rows: int, length: int) -> torch.Tensor:
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    return torch.randint(1, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0)).to(DEVICE)


@torch.no_grad()
def _logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=ids, use_cache=False).logits


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@torch.no_grad()
def _randomize(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.copy_(0.05 * torch.randn(p.shape, generator=generator))


def _ratio(seconds: list[float], reference: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))


def _trained(name: str, trainer: Any) -> Row:
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    loss = trainer.train().training_loss
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    trainable = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    counts = f"changed: {len(changed & trainable)} of {len(trainable)}, {len(changed - trainable)} of the base"
    return Row(
        f"{name}, two steps",
        f"loss {loss:.3f}; {counts}",
        "finite; the adapter alone",
        bool(changed) and changed <= trainable and math.isfinite(loss),
    )


def _reward(completions: list[str], **_: Any) -> list[float | None]:
    return [sum(byte % 2 for byte in text.encode()) / max(1, len(text.encode())) for text in completions]


if __name__ == "__main__":
    sys.exit(main())
