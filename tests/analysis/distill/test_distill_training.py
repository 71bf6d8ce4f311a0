"""`peft-steer distill --train-steps`: training by KL goes on from the fit, and from where it was interrupted."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from analysis_models import random_texts, save_tuned, tuned_blocks
from command_line import peft_steer
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from tiny import make
from transformers import TrainingArguments

from peft_steer.analysis.distill import command, training
from peft_steer.analysis.distill.fitting import fit_blocks, load_fit, save_fit
from peft_steer.analysis.distill.students import adapter_of, distances
from peft_steer.analysis.distill.training import train_by_kl
from peft_steer.analysis.inputs.pairs import Pair


TEXTS, OTHERS = (random_texts(rows=60, length=12, seed=seed, batch_size=16) for seed in (0, 1))


@pytest.fixture(scope="module")
def pair() -> Pair:
    base = make()
    return Pair(base, tuned_blocks(base), None)


def kl_of_answers(pair: Pair, model: torch.nn.Module) -> float:
    return distances(pair, {"": model}, TEXTS)[0].summary()["kl_answer"]


def weights(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}


def interrupted(monkeypatch, step: int, run: Callable, *args) -> None:
    """Runs it to that step (from 1)."""
    calls = iter(range(1, step))

    def compute_loss(self, *args, plain=training._KLTrainer.compute_loss, **kwargs):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training._KLTrainer, "compute_loss", compute_loss)
        with pytest.raises(KeyboardInterrupt):
            run(*args)


def test_the_loss_is_the_kl_of_the_answers(pair, tmp_path):
    student = adapter_of(pair, fit_blocks(pair, TEXTS, OTHERS, r=2))
    texts = random_texts(rows=4)  # one batch
    arguments = TrainingArguments(output_dir=tmp_path, report_to="none", use_cpu=True)
    trainer = training._KLTrainer(pair.tuned, training._Clock(None), model=student, args=arguments)
    loss = trainer.compute_loss(student, vars(next(iter(texts))))
    (distance,) = distances(pair, {"": student}, texts)
    assert loss.item() == pytest.approx(distance.summary()["kl_answer"], rel=1e-4)


def test_it_goes_on_from_the_fit(pair, tmp_path):
    blocks = fit_blocks(pair, TEXTS, OTHERS, r=2)
    student, frozen = adapter_of(pair, blocks), {k: v.clone() for k, v in pair.base.state_dict().items()}
    before = kl_of_answers(pair, student)
    assert train_by_kl(student, pair.tuned, TEXTS, 1e-5, seed=0, folder=tmp_path / "fit", steps=20)[0] == 20
    assert kl_of_answers(pair, student) < before
    assert all(torch.equal(v, frozen[k]) for k, v in pair.base.state_dict().items())
    scratch = adapter_of(pair, blocks, empty=True)
    assert kl_of_answers(pair, scratch) == kl_of_answers(pair, pair.base)
    steps, seconds = train_by_kl(scratch, pair.tuned, TEXTS, 2e-4, seed=0, folder=tmp_path / "new", seconds=0.5)
    assert steps > 1
    assert 0.5 <= seconds < 5
    assert (steps, seconds) == train_by_kl(
        adapter_of(pair, blocks, empty=True), pair.tuned, TEXTS, 2e-4, seed=0, folder=tmp_path / "new", seconds=0.5
    )


def test_an_interrupted_training_ends_as_one_that_was_not(pair, tmp_path, monkeypatch):
    blocks = fit_blocks(pair, TEXTS, OTHERS, r=2)

    def train(folder: str) -> tuple[PeftModel, float]:
        student = adapter_of(pair, blocks)
        steps, seconds = train_by_kl(student, pair.tuned, TEXTS, 1e-3, seed=0, folder=tmp_path / folder, steps=60)
        assert steps == 60
        return student, seconds

    def seconds_at(step: int) -> float:
        state = json.loads((tmp_path / f"parts/checkpoint-{step}/trainer_state.json").read_text())
        return state["stateful_callbacks"]["_Clock"]["attributes"]["seconds"]

    expected, _ = train("whole")
    interrupted(monkeypatch, 55, train, "parts")
    before = seconds_at(50)
    (tmp_path / "parts/checkpoint-55").mkdir()  # as if it had been killed while it wrote this one
    interrupted(monkeypatch, 10, train, "parts")  # the last of the ten that are left: the first 50 are not repeated
    found, seconds = train("parts")
    for name, tensor in weights(expected).items():
        assert torch.equal(weights(found)[name], tensor), name
    assert seconds == seconds_at(60) > before > 0  # those before the interruptions count
    again = train("parts")  # nothing is left to do
    assert again[1] == seconds
    assert all(torch.equal(weights(again[0])[name], tensor) for name, tensor in weights(found).items())


def test_a_fit_is_read_as_it_was_written(pair, tmp_path):
    blocks = fit_blocks(pair, TEXTS, OTHERS, max_error=0.5)
    save_fit(tmp_path / "fit.safetensors", blocks, {"seconds": 1.5})
    found, facts = load_fit(tmp_path / "fit.safetensors")
    assert facts == {"seconds": 1.5}
    for one, other in zip(blocks, found, strict=True):
        assert replace(one, edit=None) == replace(other, edit=None)
        for name in ("W_down", "W_up", "b"):
            assert torch.equal(getattr(one.edit, name), getattr(other.edit, name))


def test_an_interrupted_command_goes_on(tiny_llama, tmp_path, monkeypatch, capsys):
    tuned = save_tuned(tiny_llama, tmp_path / "tuned", "lora")
    (tmp_path / "sums.csv").write_text("prompt,completion\n" + "".join(f"{a}+{a}=,is {2 * a}\n" for a in range(20)))
    arguments = ["--base", tiny_llama, "--tuned", tuned, "--dataset", str(tmp_path / "sums.csv"), "--train-steps", "4"]

    def run(folder: str, *more: str) -> int:
        return peft_steer("distill", *arguments, "-o", tmp_path / folder, *more)

    assert run("whole") == 0
    interrupted(monkeypatch, 3, run, "parts")
    assert run("parts", "--train-steps", "5") == 2
    assert "is from a run with train_steps 4 instead of 5; choose" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(command, "fit_blocks", None)  # it is not repeated
        assert run("parts") == 0
    whole, parts = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert list(whole) == list(parts)
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    found = [json.loads((tmp_path / name / "distill.json").read_text())["models"] for name in ("whole", "parts")]
    assert found[0]["distilled"]["kl"] == found[1]["distilled"]["kl"]
    assert found[1]["distilled"]["seconds"] > found[1]["fitted"]["seconds"] > 0
    assert not {path.name for path in (tmp_path / "parts").iterdir()} & {"unfinished", ".lock"}
