"""Models and texts that the analyses cannot use: each is said, with its flag, before weights of a model are read."""

import argparse
import json
import logging
import re
import shutil
from pathlib import Path

import pytest
from analysis_models import save_tuned
from command_line import peft_steer
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from peft_steer import PostBlockSteerConfig
from peft_steer.analysis.inputs.texts import load_texts
from peft_steer_cli.inputs import add_text_arguments


# files of text, by name
TEXTS = {
    "sums.csv": "prompt,completion\n" + "".join(f"{a}+{b}=,{a + b}\n" for a in range(4) for b in range(4)),
    "four.txt": "hello\n" * 4,
    "short.txt": "a\n" * 20,
    "blank.txt": "\n\n\n",
    "empty.txt": "",
    "empty.jsonl": "",
    "no_rows.csv": "prompt,completion\n",
    "no_rows.json": "[]",
    "columns.csv": "question,answer\n1+1,2\n",
    "broken.json": "{oops",
    "broken.parquet": "no parquet",
}


def other_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, "b": 1}, [])))


@pytest.fixture(scope="module")
def folder(tiny_llama, tmp_path_factory) -> Path:
    """Texts; models, of which there is no more than is looked at; adapters of them and of the base."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, text in TEXTS.items():
        (folder / name).write_text(text)

    llama, tokenizer = LlamaConfig.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    configs = {
        name: LlamaConfig(**{**llama.to_dict(), **change})
        for name, change in {
            "same": {},
            "wide": {"hidden_size": 64},
            "deep": {"num_hidden_layers": 3},
            "shallow": {"num_hidden_layers": 1},
            "words": {"vocab_size": 300},
        }.items()
    }
    configs |= {"gpt2": GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=4), "t5": T5Config()}
    for name, config in configs.items():
        config.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name in ("other_tokenizer", "no_tokenizer"):
        llama.save_pretrained(folder / name)
    other_tokenizer().save_pretrained(folder / "other_tokenizer")

    lora = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    adapters = {
        "lora": ("same", LoraConfig(**lora)),
        "lora_wide": ("wide", LoraConfig(**lora)),
        "lora_deep": ("deep", LoraConfig(**lora)),
        "lora_shallow": ("shallow", LoraConfig(**{**lora, "target_modules": ["q_proj", "down_proj"]})),
        "lora_gpt2": ("gpt2", LoraConfig(**lora)),
        "steer_deep": ("deep", PostBlockSteerConfig(r=2)),
        "prompt_tuning": ("same", PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")),
    }
    for name, (base, config) in adapters.items():
        model = AutoModelForCausalLM.from_config(configs[base])
        model.config.name_or_path = str(folder / base)
        get_peft_model(model, config).save_pretrained(folder / name)

    for name in ("adapter_tokenizer", "bad_tokenizer", "no_weights", "cut_weights", "no_json", "no_type", "new_type"):
        shutil.copytree(folder / "lora", folder / name)
    other_tokenizer().save_pretrained(folder / "adapter_tokenizer")
    (folder / "bad_tokenizer/tokenizer_config.json").write_text("{")
    (folder / "no_weights/adapter_model.safetensors").unlink()
    (folder / "cut_weights/adapter_model.safetensors").write_bytes(b"cut")
    settings = json.loads((folder / "lora/adapter_config.json").read_text())
    (folder / "no_json/adapter_config.json").write_text("{not json")
    (folder / "no_type/adapter_config.json").write_text("[]")
    (folder / "new_type/adapter_config.json").write_text(json.dumps({**settings, "peft_type": "UNHEARD_OF"}))
    (folder / "nothing").mkdir()
    return folder


@pytest.fixture
def refused(folder, tiny_llama, capsys, monkeypatch):
    """Asserts that `peft-steer analyze` refuses these words with a message, before it loads a model. `DIR` stands for
    the folder."""

    def no_model(*args, **kwargs):
        raise AssertionError("a model was loaded")

    def check(words: list[str], message: str) -> None:
        words = [words[0], "--base", tiny_llama, "--output", "DIR/out", *words[1:]]
        assert peft_steer("analyze", *(word.replace("DIR", str(folder)) for word in words)) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1].replace(str(folder), "DIR")
        assert re.search(message, said), said

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", no_model)
    return check


ORACLE = ["oracle", "--dataset", "DIR/sums.csv", "--tuned"]


@pytest.mark.parametrize(
    ("tuned", "message"),
    [
        ("gpt2", "has model_type='gpt2' and the base .* has 'llama'; it must be a fine-tuned version of the base"),
        ("wide", "has hidden_size=64 and the base .* has 32"),
        ("deep", "has num_hidden_layers=3 and the base .* has 2"),
        ("words", "has vocab_size=300 and the base .* has 257"),
        ("other_tokenizer", "has another tokenizer than the base .*: they do not read the same tokens. Give the base"),
        ("nowhere", "is neither a directory with a config.json nor a hub id that can be reached"),
        ("nothing", "is neither a directory with a config.json"),
        ("sums.csv", "is neither a directory with a config.json"),
        ("lora_wide", r"does not belong to the base '.*' \(.* size mismatch for .*, 64\].*, 32\]"),
        (
            "lora_deep",
            "does not belong to the base '.*', which has no place for 14 of its 42 tensors, such as '.*layers.2.mlp",
        ),
        (
            "lora_shallow",
            "does not belong to the base '.*' or is damaged: it lacks 4 of 8 tensors, such as '.*layers.1.mlp",
        ),
        ("lora_gpt2", r"does not belong to the base '.*' \(.*c_(attn|proj|fc).* not found in the base model"),
        ("steer_deep", r"does not belong to the base '.*' \(.*num_blocks=3; LlamaForCausalLM has 32 and 2"),
        ("prompt_tuning", "is a PROMPT_TUNING adapter, which adds tokens of its own: .* Choose another kind"),
        ("adapter_tokenizer", "has another tokenizer than the base"),
        ("bad_tokenizer", "has no tokenizer that can be loaded"),
        ("no_weights", "has no adapter weights that can be read"),
        ("cut_weights", r"has no adapter weights that can be read \(SafetensorError: "),
        ("no_json", r"has no adapter_config.json that PEFT can read \(JSONDecodeError: "),
        ("no_type", "has no adapter_config.json that PEFT can read"),
        ("new_type", r"has no adapter_config.json that PEFT can read \(KeyError: 'UNHEARD_OF'\)"),
    ],
)
def test_tuned(refused, tuned, message):
    refused([*ORACLE, f"DIR/{tuned}"], f"^peft-steer analyze: --tuned: 'DIR/{tuned}' {message}")


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("DIR/nowhere", "is neither a directory with a config.json nor a hub id that can be reached"),
        ("nobody/nothing", "is neither .* nor a hub id that can be reached"),
        ("DIR/lora", "is neither a directory with a config.json"),
        ("DIR/no_tokenizer", "has no tokenizer that can be loaded; save one beside the model"),
        ("DIR/t5", "is a t5 model; it must be a causal language model"),
    ],
)
def test_base(refused, base, message):
    refused([*ORACLE, "DIR/lora", "--base", base], f"^peft-steer analyze: --base: '{base}' {message}")


def test_a_tokenizer_that_cannot_pad(refused):
    refused([*ORACLE, "DIR/lora", "--base", "DIR/other_tokenizer"], "--base: .* neither an end nor a padding token")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("DIR/nowhere.csv", "cannot be read .*find any data file"),
        ("nobody/nothing", "cannot be read"),
        ("DIR/nothing", "cannot be read .*doesn't contain any data files"),
        ("DIR/empty.txt", "is an empty file"),
        ("DIR/empty.jsonl", "is an empty file"),
        ("DIR/no_rows.csv", "has no rows"),
        ("DIR/no_rows.json", "has no rows"),
        ("DIR/broken.json", "cannot be read .*JSON parse error"),
        ("DIR/broken.parquet", "cannot be read .*Parquet"),
        ("DIR/columns.csv", r"has the columns \['answer', 'question'\]; it needs `text`, or `prompt` and"),
        ("DIR/blank.txt", "gives 0 texts of two or more tokens .* at least 1 are needed. Give more or longer texts"),
        ("DIR/short.txt", "gives 0 texts of two or more tokens .* or raise --num_texts or --max_length"),
    ],
)
def test_dataset(refused, dataset, message):
    refused(["errors", "--dataset", dataset], f"^peft-steer analyze: --dataset: '{dataset}' {message}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--load_in_4bit", "--load_in_8bit"], "--load_in_4bit and --load_in_8bit: choose one of them"),
        (["--task", "listops_short"], "--task, --dataset: give one of them"),
        (["--num_fewshot", "2"], "--num_fewshot is 2, which goes with --task; give that, or leave it out"),
        (["--include_path", "DIR"], "--include_path is 'DIR', which goes with --task"),
        (["--dataset_config", "en"], "--dataset_config is 'en', and the file 'DIR/sums.csv' has none"),
        (["--split", "tset"], "--dataset: 'DIR/sums.csv' cannot be read .*Bad split: tset. Available splits"),
        (["--num_texts", "0"], "argument --num_texts: must be at least 1, not 0"),
        (["--held_out", "0"], "argument --held_out: must be at least 1, not 0"),
        (["--batch_size", "0"], "argument --batch_size: must be at least 1, not 0"),
        (["--max_length", "1"], "argument --max_length: must be at least 2, not 1"),
        (["--max_length", "3"], "gives 0 texts .* with an answer .* raise --num_texts or --max_length"),
        (["--seed=-1"], "argument --seed: must be at least 0, not -1"),
        (["--new_tokens", "0"], "argument --new_tokens: must be at least 1, not 0"),
        (["--dataset", "DIR/four.txt"], "gives 4 texts of two or more tokens .* at least 5 are needed"),
        (["--output", "DIR/sums.csv"], "argument --output/-o: 'DIR/sums.csv' is a file; name a directory"),
    ],
)
def test_flags(refused, flags, message):
    refused([*ORACLE, "DIR/lora", *flags], message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--task, --dataset: give one of them"),
        (["--task", "listops_short", "--split", "train"], "--split is 'train', which goes with --dataset"),
        (["--task", "listops_short", "--include_path", "DIR/x"], "include_path: there is no folder 'DIR/x'"),
        (["--task", "listops_short", "--num_fewshot=-1"], "argument --num_fewshot: must be at least 0, not -1"),
        (["--task", "listops_short", "--num_fewshot", "2"], "num_fewshot: task 'listops_short' says 0"),
    ],
)
def test_tasks(refused, flags, message):
    refused(["oracle", "--tuned", "DIR/lora", *flags], message)


@pytest.mark.parametrize("analysis", ["oracle", "where", "errors"])
def test_a_tuned_model_that_is_the_base(tiny_llama, folder, tmp_path, capsys, analysis):
    words = [analysis, "--base", tiny_llama, "--tuned", tiny_llama, "--dataset", str(folder / "sums.csv")]
    assert peft_steer("analyze", *words, "--output", tmp_path) == 2
    assert "on this text the tuned model does what the base does" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gaps.csv", "prompt,completion\n1+1=,02\n1+2=,\n,4\n2+3=,NA\n"),
        (
            "gaps.jsonl",
            '{"prompt": "1+1=", "completion": "02"}\n{"prompt": "1+2=", "completion": null}\n'
            '{"prompt": "2+3=", "completion": "NA"}\n',
        ),
    ],
)
def test_cells_are_read_as_they_are(tiny_llama, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    parser = argparse.ArgumentParser()
    add_text_arguments(parser, held_out=False)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    texts, _ = load_texts(parser.parse_args(["--dataset", str(tmp_path / name)]), tokenizer)
    assert sorted(tokenizer.decode(ids) for ids, _ in texts.rows) == ["1+1=02", "2+3=NA"]


@pytest.mark.parametrize("analysis", ["linear", "distill", "oracle", "errors"])
def test_singular_moments_are_said(tiny_llama, folder, tmp_path, caplog, analysis):
    """A few texts have fewer tokens than hidden states have dimensions. (The tuned model lacks a tokenizer.)"""
    tuned = save_tuned(tiny_llama, tmp_path / "tuned", "full")
    words = ["--base", tiny_llama, "--tuned", tuned, "--dataset", str(folder / "sums.csv"), "--num_texts", "4"]
    words += ["--output", str(tmp_path / "out")]
    few = {"errors": ["--iterations", "1"], "linear": ["--held_out", "1", "--ranks", "2"]}
    words += few.get(analysis, ["--held_out", "1"])
    with caplog.at_level(logging.INFO, "peft_steer"):
        command = ["distill"] if analysis == "distill" else ["analyze", analysis]
        assert peft_steer(*command, *words) == 0
    matrix = {"oracle": "each dh", "errors": "what each block has to add"}.get(analysis, "block 1")
    assert re.search(f"moment matrix of {matrix} is singular.* vectors of width 32", caplog.text)
    assert f"{tuned} has no tokenizer: the base's is used" in caplog.text
