"""The report of a comparison: its tables and files, from results as a grid gives them."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic_bench import ENVIRONMENT, GRID, cell, failed, result, sweep_and_test

from peft_steer.bench.report import write_report
from peft_steer.bench.statistics import Scores, compare


def rows(markdown: str, table: int = 0) -> list[dict[str, str]]:
    """The lines of one of the tables in a Markdown text, by column."""
    tables: list[list[list[str]]] = []
    previous = ""
    for line in markdown.splitlines():
        if line.startswith("|"):
            if not previous.startswith("|"):
                tables.append([])
            tables[-1].append([entry.strip() for entry in line.strip("|").replace(r"\|", "¦").split("|")])
        previous = line
    names, _, *lines = tables[table]
    return [dict(zip(names, line, strict=True)) for line in lines]


def report(pairs, folder: Path, **arguments) -> str:
    cells, results = zip(*pairs, strict=True)
    return write_report(GRID, cells, results, folder, **arguments)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep of two rates and then three seeds of the chosen one: cells with results, Markdown, folder."""
    pairs = [(cell("base"), result(cell("base"), 0.2))]
    pairs += sweep_and_test("LoRA", {1e-3: 0.5, 1e-2: 0.6}, 1e-2)
    pairs += sweep_and_test("twin", {1e-3: 0.6, 1e-2: 0.3}, 1e-3)
    pairs += sweep_and_test("weak", {1e-3: 0.4, 1e-2: 0.35}, 1e-3)
    folder = tmp_path_factory.mktemp("report")
    return pairs, report(pairs, folder, remarks=["weak: widen the sweep"]), folder


def test_the_main_table(swept):
    pairs, text, _ = swept
    lines = {line["method"]: line for line in rows(text)}
    assert list(lines) == ["base", "LoRA", "twin", "weak"]
    assert [line["learning rate"] for line in lines.values()] == ["–", "0.01", "0.001", "0.001"]
    tested = [r for c, r in pairs if c.name == "LoRA" and c.split == "test"]
    assert len(tested) == 3
    assert lines["LoRA"]["acc ± s.e."].split(" ± ")[0] == f"{np.mean([r['score'] for r in tested]):.3f}"
    assert lines["LoRA"]["seeds"] == "3"
    assert lines["base"]["seeds"] == "1"
    low, high = map(float, lines["base"]["95 % CI"].split(" to "))
    assert low < pairs[0][1]["score"] < high
    against = {name: line["against the best"] for name, line in lines.items()}
    assert sorted(against[name].split(" ")[0] for name in ("LoRA", "twin")) == ["best", "tie"]
    assert against["base"].startswith("−0.")
    assert against["base"].endswith("(p < 0.001)")
    assert lines["LoRA"]["ties"] == lines["twin"]["ties"] == "a"
    assert "a" not in lines["base"]["ties"]
    assert lines["LoRA"]["training"] == f"{tested[0]['train_seconds']:.0f} s"
    assert lines["LoRA"]["tokens/s"] == f"{24_000 / tested[0]['train_seconds']:.0f}"
    assert lines["LoRA"]["forgetting"] == "+0.010"
    assert lines["LoRA"]["decoding"] == "1.07 x"
    assert lines["base"]["file"] == "–"
    assert "each of the 6 pairs is tested (paired t), p after Holm's correction" in text
    assert "torch 2.13.0" in text
    assert "- weak: widen the sweep" in text


def test_the_sweep(swept):
    pairs, text, _ = swept
    lines = rows(text, table=1)
    found = {(c.name, c.learning_rate): r["score"] for c, r in pairs if c.split == "validation"}
    assert [line["method"] for line in lines] == ["LoRA", "twin", "weak"]
    assert lines[0]["rate: score"] == f"0.001: {found['LoRA', 1e-3]:.3f}"
    assert lines[0][""] == f"**0.01: {found['LoRA', 1e-2]:.3f}**"
    assert lines[1]["rate: score"].startswith("**0.001: ")


def test_the_files_have_every_number(swept):
    pairs, _, folder = swept
    frame = pd.read_csv(folder / "results.csv")
    assert list(frame["key"]) == [c.key for c, _ in pairs]
    for (c, r), (_, line) in zip(pairs, frame.iterrows(), strict=True):
        assert (line["method"], line["split"], line["seed"], line["status"]) == (c.name, c.split, c.seed, "done")
        for name in ("score", "stderr", "n", "trainable", "parameters", "train_seconds", "peak_bytes", "decode_ratio"):
            assert (pd.isna(line[name]) and r[name] is None) or line[name] == pytest.approx(r[name])
        assert line["torch"] == ENVIRONMENT["torch"]
        if c.config:
            assert line["forgetting"] == pytest.approx(r["forgetting"]["after"] - r["forgetting"]["before"])
            assert line["final_loss"] == r["loss"][-1][1]
            assert line["learning_rate"] == c.learning_rate
    pair = pd.read_csv(folder / "comparisons.csv").set_index(["first", "second"]).loc["base", "LoRA"]
    tested = {
        name: [r["items"] for c, r in pairs if c.name == name and c.split == "test"] for name in ("base", "LoRA")
    }
    expected = compare(*(Scores.gather(name, items) for name, items in tested.items()))
    assert pair["p"] == pytest.approx(expected.p)
    assert pair["difference"] == pytest.approx(expected.difference)
    assert not pair["tie"]
    assert (folder / "figure.png").stat().st_size > 10_000


def test_what_failed(tmp_path):
    pairs = sweep_and_test("LoRA", {1e-3: 0.5, 1e-2: 0.6}, 1e-2)
    pairs[0] = (pairs[0][0], failed("RuntimeError: NaN"))
    pairs[3] = (pairs[3][0], failed("OSError: disk | full"))
    pairs += [
        (c, failed()) for c, _ in sweep_and_test("never", {1e-3: 0.5, 1e-2: 0.6}, 1e-2) if c.split == "validation"
    ]
    text = report(pairs, tmp_path)
    lora, never = rows(text)
    assert lora["seeds"] == "2 of 3"
    assert never["acc ± s.e."] == "failed"
    assert rows(text, table=1)[0]["rate: score"] == "0.001: failed"
    assert "- LoRA: RuntimeError: NaN (learning rate 0.001, seed 0, validation)" in text
    assert "- LoRA: OSError: disk | full (learning rate 0.01, seed 1, test)" in text
    assert text.count("- never: RuntimeError: out of memory") == 2
    assert "4 failed" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_when_nothing_worked(tmp_path):
    text = report([(cell("base"), failed()), (cell("LoRA"), failed())], tmp_path)
    assert [line["acc ± s.e."] if "acc ± s.e." in line else line["score ± s.e."] for line in rows(text)] == [
        "failed"
    ] * 2
    assert not (tmp_path / "comparisons.csv").exists()


def test_one_cell(tmp_path):
    text = report([(cell("LoRA"), result(cell("LoRA"), 0.5))], tmp_path)
    (line,) = rows(text)
    assert "ties" not in line
    assert "against the best" not in line
    assert "with one seed it is not known how much others would differ" in text


def test_validation_scores_alone(tmp_path):
    cells = [cell("LoRA", rate, split="validation") for rate in (1e-3, 1e-2)]
    cells.append(cell("LoReFT", 1e-3, split="validation", config={"peft_type": "LORA", "r": 4}))
    text = report([(c, result(c, 0.5)) for c in cells], tmp_path)
    assert [(line["method"], line["learning rate"]) for line in rows(text)] == [
        ("LoRA", "0.001"),
        ("LoRA", "0.01"),
        ("LoReFT", "0.001"),
    ]
    assert "a rate chosen by them has no result yet" in text
    names = pd.read_csv(tmp_path / "comparisons.csv")[["first", "second"]].to_numpy().tolist()
    assert names == [["LoRA, 0.001", "LoRA, 0.01"], ["LoRA, 0.001", "LoReFT"], ["LoRA, 0.01", "LoReFT"]]


def test_a_sweep_over_a_field_of_the_config(tmp_path):
    def at(positions: str, **changes):
        return cell("ReFT", config={"peft_type": "STEER", "r": 8, "positions": positions}, **changes)

    cells = [at("last", split="validation"), at("f7+l7", split="validation"), at("f7+l7")]
    text = report([(c, result(c, 0.5)) for c in cells], tmp_path)
    assert rows(text)[0]["learning rate"] == "0.001, positions=f7+l7"
    assert [line["variant"] for line in rows(text, table=1)] == ["positions=last", "positions=f7+l7"]
    assert [line["rate: score"].startswith("**") for line in rows(text, table=1)] == [False, True]


def test_models_and_tasks_are_apart(tmp_path):
    cells = [
        cell(name, model=m, task=t) for m in ("one", "two") for t in ("boolq", "gsm8k") for name in ("base", "LoRA")
    ]
    cells = [cell(**vars(c) | {"quantization": {"load_in_4bit": True}}) if c.model == "two" else c for c in cells]
    text = report([(c, result(c, 0.5 if c.config else 0.2)) for c in cells], tmp_path)
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        "## one, float32; boolq, test split",
        "## one, float32; gsm8k, test split",
        "## two, float32 (load_in_4bit=True); boolq, test split",
        "## two, float32 (load_in_4bit=True); gsm8k, test split",
    ]
    assert len(pd.read_csv(tmp_path / "comparisons.csv")) == 4
    assert "the pair is tested (exact McNemar)" in text


def test_methods_on_different_items_are_not_compared(tmp_path):
    base, lora = cell("base"), cell("LoRA")
    text = report([(base, result(base, 0.2)), (lora, result(lora, 0.5, n=150))], tmp_path)
    assert [line["against the best"] for line in rows(text)] == ["not compared", "best"]
    assert "base and LoRA were evaluated on different items: 150 in both, 50 and 0 in one alone" in text
