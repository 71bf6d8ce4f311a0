"""Documents in the columns of the paper's data sets. They are made up: none is in those data sets."""

import json
from pathlib import Path


BOOLQ = [
    {"question": "is the bridge made of stone", "passage": "The bridge was built of oak.", "answer": False},
    {"question": "is the lake deep", "passage": "The lake has a depth of 90 metres.", "answer": True},
]
WINOGRANDE = [
    {
        "sentence": "The cup did not fit into the box because the _ was too wide.",
        "option1": "cup",
        "option2": "box",
        "answer": "1",
    },
    {"sentence": "Ina asked Bea for salt, and _ gave it.", "option1": "Ina", "option2": "Bea", "answer": "2"},
]
GSM8K = [
    {"question": "Tom has 3 bags of 4 nuts. How many nuts?", "answer": "He has 3*4=<<3*4=12>>12 nuts.\n#### 12"},
    {"question": "A car costs $900 and a van twice that. And the van?", "answer": "2*900=1800\n#### 1,800"},
]
ARC = [
    {
        "id": "a",
        "question": "What melts ice?",
        "choices": {"text": ["heat", "it's the moon", 'a "cold" wind'], "label": ["A", "B", "C"]},
        "answerKey": "A",
    },
    {
        "id": "b",
        "question": "Which is a metal?",
        "choices": {"text": ["wood", "iron"], "label": ["1", "2"]},
        "answerKey": "2",
    },
]
AQUA = [
    {
        "question": "What is 2+5?",
        "options": ["A)3", "B)5", "C)7", "D)9", "E)11"],
        "rationale": "2+5=7\nAnswer: option C, not B",
        "correct": "C",
    },
    {
        "question": "Half of 8?",
        "options": ["A)4", "B)5", "C)6", "D)7", "E)8"],
        "rationale": "8/2=4",
        "correct": "A",
    },
]
# By folder: the documents, and the hub's splits.
FOLDERS = {
    "google/boolq": (BOOLQ, ("train", "validation")),
    "allenai/winogrande/winogrande_debiased": (WINOGRANDE, ("train", "validation", "test")),
    "openai/gsm8k/main": (GSM8K, ("train", "test")),
    "allenai/ai2_arc/ARC-Challenge": (ARC, ("train", "validation", "test")),
    "deepmind/aqua_rat/raw": (AQUA, ("train", "validation", "test")),
}


def write(root: Path, times: int = 5) -> Path:
    """Files of these documents, each `times` times and numbered where a text can be, in every split of the hub's."""
    for name, (docs, splits) in FOLDERS.items():
        (root / name).mkdir(parents=True)
        for split in splits:
            key = "sentence" if "sentence" in docs[0] else "question"
            rows = [{**doc, key: f"{doc[key]} {split} {i}"} for i in range(times) for doc in docs]
            (root / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return root
