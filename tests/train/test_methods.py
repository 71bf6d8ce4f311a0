"""Every method from a trainer to a score: TRL's SFTTrainer, the saved adapter, `peft-steer lm-eval`."""

import json

import pytest
import torch
import transformers as tf
from harness import FEW, files_of, scores
from sft import sft_trainer

from peft_steer import JolaConfig, LofitConfig, LoreftConfig, SteerConfig
from peft_steer.evaluation.lm import PeftSteerLM


F7L7 = {"positions": "f7+l7"}
METHODS = {
    **{kind: LoreftConfig(kind=kind, **F7L7) for kind in ("loreft", "noreft", "direft", "nodireft")},
    **{
        f"{kind}, separate": LoreftConfig(kind=kind, site="block", share_weights=False, **F7L7)
        for kind in ("loreft", "noreft", "direft", "nodireft")
    },
    "lofit": LofitConfig(selection_step=2, num_heads=3),
    "jola": JolaConfig(),
    "last heads": JolaConfig(positions="last"),
    "houlsby": SteerConfig(site=["attention", "mlp"], kind="nonlinear"),
    "every site": SteerConfig(site=["block", "mlp", "attention", "heads"], kind="linear", positions="prompt"),
}


@pytest.mark.parametrize("method", METHODS)
def test_trained_saved_loaded_and_scored(tiny_llama, tmp_path, command, method):
    """The file's scores are those of the model that was trained, and not the base's."""
    config = METHODS[method]
    config.task_type = "CAUSAL_LM"
    trainer = sft_trainer(
        tf.AutoModelForCausalLM.from_pretrained(tiny_llama),
        tiny_llama,
        tmp_path / "adapter",
        config,
        max_steps=4,
        save_strategy="no",
        learning_rate=0.05,
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, p in trainer.model.named_parameters():
        assert p.requires_grad or torch.equal(p, before[name])
    trainer.save_model()

    arguments = ["--model", "peft-steer", "--device", "cpu", "--tasks", "listops_short", "--limit", 3, *FEW]
    model_args = {"pretrained": tiny_llama, "peft": [None, str(tmp_path / "adapter")]}
    arguments += ["--model_args", json.dumps(model_args), "--log_samples", "--output_path", tmp_path / "out"]
    assert command(*arguments) == 0
    (_, base), (_, found) = (files_of(tmp_path / "out", name) for name in (tiny_llama, str(tmp_path / "adapter")))
    trained = PeftSteerLM(pretrained=trainer.model.eval(), tokenizer=trainer.processing_class)
    requests = [[tuple(pair.values()) for pair in sample["arguments"].values()] for sample in found]
    want = [[score for score, _ in trained._loglikelihood_tokens(encoded(trained, pairs))] for pairs in requests]
    torch.testing.assert_close(torch.tensor(scores(found)), torch.tensor(want), rtol=1e-4, atol=1e-4)
    assert (torch.tensor(scores(found)) - torch.tensor(scores(base))).abs().max() > 1e-3


def encoded(harness: PeftSteerLM, pairs: list[tuple[str, str]]) -> list[tuple]:
    return [(pair, *harness._encode_pair(*pair)) for pair in pairs]
