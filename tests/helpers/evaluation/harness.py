"""What `peft-steer lm-eval` wrote."""

import json
from pathlib import Path


FEW = ["--metadata", "n_train=8,n_validation=8,n_test=8"]


def files_of(folder: Path, name: str) -> tuple[dict, list[dict]]:
    """The results, and the samples of `listops_short`, of the run on the adapter (or base) of that path."""
    (folder,) = (f for f in folder.iterdir() if f.name == name.replace("/", "__"))
    (results,) = folder.glob("results_*.json")
    (samples,) = folder.glob("samples_listops_short_*.jsonl")
    return json.loads(results.read_text()), [json.loads(line) for line in samples.read_text().splitlines()]


def scores(samples: list[dict]) -> list[list[float]]:
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    return [[float(x) for x, _ in sample["filtered_resps"]] for sample in samples]
