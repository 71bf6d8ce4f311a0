"""The model card that `peft-steer sft`, `grpo` and `dpo` write."""

import shutil

from huggingface_hub import ModelCard

from peft_steer.train import sft


STEER = {"peft_type": "STEER", "kind": "nonlinear", "r": 2}


def test_the_card_states_the_licence_of_the_base_and_what_was_measured(run, tiny_llama, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    evaluated = {**STEER, "eval_strategy": "steps", "eval_steps": 2, "model_name_or_path": str(base)}
    plain = ModelCard.load(run(sft, "plain", **STEER) / "README.md").data
    assert plain.license is None  # nothing states one
    assert plain.eval_results is None
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: ours\n---\nA base.\n")
    card = ModelCard.load(run(sft, **evaluated) / "README.md").data
    assert (card.license, card.license_name) == ("other", "ours")
    assert {"peft-steer", "sft", "steer"} <= set(card.tags)
    measured = {result.metric_type: result.metric_value for result in card.eval_results}
    assert measured.keys() == {"loss", "mean_token_accuracy"}
    assert 0 < measured["loss"] < 20
    assert {result.dataset_name for result in card.eval_results} == {"sums_choice"}
