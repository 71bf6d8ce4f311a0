"""One of the training commands, run to the end on a tiny model and a task of eight sums."""

import json
from pathlib import Path

import pytest

from peft_steer_cli import main


COMMON = {
    "learning_rate": 0.01,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
}


@pytest.fixture
def run(tmp_path, tiny_llama):
    """Runs a command on a recipe of its own and returns the output folder."""
    rows = [{"sum": f"{i}+1", "value": str(i + 1), "choices": ["0", str(i + 1)]} for i in range(8)]
    data = {}
    for split in ("train", "validation", "test"):
        data[split] = str(tmp_path / f"{split}.json")
        Path(data[split]).write_text("\n".join(map(json.dumps, rows)))
    task = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": data},
        **{f"{split}_split": split for split in ("validation", "test")},
        "training_split": "train",
        "doc_to_text": "{{sum}}=",
        "doc_to_target": "value",
        "target_delimiter": "",
        "metadata": {"version": 1},
    }
    choice = {"task": "sums_choice", "output_type": "multiple_choice", "doc_to_choice": "choices"}
    text = {"task": "sums_text", "output_type": "generate_until", "generation_kwargs": {"until": ["\n"]}}
    (tmp_path / "tasks").mkdir()
    for kind in (choice, text):
        (tmp_path / "tasks" / f"{kind['task']}.yaml").write_text(json.dumps({**task, **kind}))

    def start(command, output="out", expect=0, **keys) -> Path:
        out = tmp_path / output
        name = "sums_text" if command.__name__.endswith(".grpo") else "sums_choice"
        where = {
            "model_name_or_path": tiny_llama,
            "include_path": str(tmp_path / "tasks"),
            "task": name,
            "output_dir": str(out),
        }
        recipe = {k: v for k, v in {**COMMON, **where, **keys}.items() if v is not None}
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        assert main([command.__name__.rpartition(".")[2], "--config", str(tmp_path / "recipe.yaml")]) == expect
        return out

    return start
