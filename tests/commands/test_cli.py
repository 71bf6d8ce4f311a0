"""The console command, run as a user runs it; above all lm-eval's own command line on saved adapters."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel
from saved import save_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_steer import PostBlockSteerConfig
from peft_steer.commands import shell
from peft_steer.cost import methods
from peft_steer.evaluation.tasks import OUR_TASKS
from peft_steer.utils.errors import UsageError
from peft_steer_cli import cost, main
from peft_steer_cli.main import COMMANDS


def command(*arguments: str) -> subprocess.CompletedProcess:
    """`peft-steer ARGUMENTS` in a process of its own."""
    call = [sys.executable, "-m", "peft_steer.commands.cli", *arguments]
    return subprocess.run(call, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def answers(model: torch.nn.Module, model_path: str, expressions: list[str]) -> torch.Tensor:
    """The log-likelihoods of the ten digits after each expression, computed plainly."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    digits = [tokenizer(str(digit)).input_ids[0] for digit in range(10)]
    with torch.no_grad():
        logits = [model(**tokenizer(f"{text}=", return_tensors="pt")).logits[0, -1] for text in expressions]
    return torch.stack(logits).log_softmax(-1)[:, digits]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harness_model", "config"),
    [
        ("hf", PostBlockSteerConfig(r=2, task_type="CAUSAL_LM")),
        ("peft-steer", LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")),
    ],
)
def test_lm_eval_evaluates_saved_adapters(tiny_llama, tmp_path, harness_model, config):
    adapter = save_adapter(tiny_llama, config, tmp_path / "adapter")
    # The user's own tasks stay on the path beside ours.
    (tmp_path / "mine.yaml").write_text(f"include: {OUR_TASKS}/listops/listops_short.yaml\ntask: my_very_own\n")
    model_args = f"pretrained={tiny_llama},peft={adapter}"
    arguments = ["--model", harness_model, "--model_args", model_args, "--device", "cpu", "--log_samples"]
    arguments += ["--tasks", "listops_short,my_very_own", "--limit", "20", "--include_path", str(tmp_path)]
    result = command("lm-eval", *arguments, "--output_path", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert all(task in result.stdout for task in ("listops_short", "my_very_own"))
    samples = [
        json.loads(line) for line in next(tmp_path.rglob("samples_listops_short*.jsonl")).read_text().splitlines()
    ]
    assert len(samples) == 20
    expressions = [sample["doc"]["expression"] for sample in samples]
    scores = torch.tensor([[float(score) for score, _ in sample["filtered_resps"]] for sample in samples])
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert (scores - answers(base, tiny_llama, expressions)).abs().mean() > 0.1
    adapted = PeftModel.from_pretrained(base, adapter)
    torch.testing.assert_close(scores, answers(adapted, tiny_llama, expressions), atol=1e-4, rtol=1e-4)


def test_usage(capsys):
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(name in usage for name in ("bench", "cost", "lm-eval"))
    assert main([]) == 2
    assert main(["benhc"]) == 2
    assert "unknown command 'benhc', did you mean 'bench'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "output"),
    [
        ([], 2, "usage: peft-steer COMMAND"),
        (["--help"], 0, "usage: peft-steer COMMAND"),
        (["analize"], 2, "did you mean 'analyze'?"),
        (["bench", "--help"], 0, "--dry-run"),
        (["bench", "grid.yaml", "--jobs", "0"], 2, "--jobs: must be at least 1, not 0"),
        (
            ["bench", "grid.yaml", "--dry-run", "--export-peft"],
            2,
            "expected one argument",
        ),
        (["tasks", "--help"], 0, "--include_path"),
        (["cost", "--help"], 0, "--random_weights"),
        (["analyze", "--help"], 0, "first-order"),
        (["analyze", "oracle", "--help"], 0, "--tuned"),
        (["analyze", "orcale"], 2, "invalid choice: 'orcale'"),
        (["distill", "--help"], 0, "--max_error"),
        (["distill", "--max-error", "-1"], 2, "--max_error: must be above 0, not -1"),
    ],
)
def test_help_and_mistyped_commands_import_nothing(words, code, output):
    script = (
        "import sys; from peft_steer_cli import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'peft', 'peft_steer'} & set(sys.modules); sys.exit(code)"
    )
    process = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert process.returncode == code, process.stderr
    assert output in process.stdout + process.stderr


def test_a_package_that_is_not_installed_is_named_with_its_extra(monkeypatch, capsys):
    def imports(name):
        def command(arguments):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        monkeypatch.setattr(shell, "imports", command, raising=False)
        return shell.run("peft-steer x", "peft_steer.commands.shell:imports", [], "bench")

    assert imports("statsmodels.stats") == 2
    assert (
        "needs 'statsmodels.stats', which is not installed: pip install 'peft-steer[bench]'" in capsys.readouterr().err
    )
    with pytest.raises(ModuleNotFoundError, match=r"peft_steer\.gone"):  # a fault of ours
        imports("peft_steer.gone")


def test_the_extras_of_commands_exist():
    project = (OUR_TASKS.parent / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    extras = set(re.findall(r"^(\w+) = \[", project.split("\n[")[0], re.MULTILINE))
    assert {command.extra for command in COMMANDS.values()} <= extras


def test_the_help_of_cost_names_its_presets():
    assert tuple(methods.PRESETS) == cost.PRESETS


def test_mistakes_are_reported_and_faults_keep_their_traceback(monkeypatch, capsys):
    def mistaken(arguments):
        raise UsageError("--r is 0, it must be at least 1")

    def faulty(arguments):
        raise ValueError("of torch, hours in")

    monkeypatch.setattr(shell, "mistaken", mistaken, raising=False)
    monkeypatch.setattr(shell, "faulty", faulty, raising=False)
    assert shell.run("peft-steer x", "peft_steer.commands.shell:mistaken", []) == 2
    assert capsys.readouterr().err == "peft-steer x: --r is 0, it must be at least 1\n"
    with pytest.raises(ValueError, match="hours in"):
        shell.run("peft-steer x", "peft_steer.commands.shell:faulty", [])
