"""The table of a measurement."""

import statistics
from typing import Any

from tabulate import tabulate


CHECKPOINTING = {False: "", True: " + checkpointing"}


def report(results: dict[str, Any]) -> str:
    """The table of a measurement, in Markdown, under a line that says what was measured."""
    floor, rows = results["methods"]["floor"], results["methods"]
    table = []
    for name, row in rows.items():
        cells = {
            "method": name,
            "trainable": f"{row['trainable']:,}",
            "share": f"{row['trainable'] / row['parameters']:.3%}",
            "file": f"{row['file_bytes'] / 1e3:,.1f} kB",
        }
        for setting, size in row["saved_bytes"].items():
            cells[f"kept, {setting}"] = f"{size / floor['saved_bytes'][setting]:.3f}"
        for dtype, kernels in row["kernels"].items():
            cells[f"kernels, {dtype}"] = f"+{kernels:.4g}"
        for reference in ("floor", "lora"):
            cells[f"step / {reference}"] = _ratios(row["step_seconds"], rows[reference]["step_seconds"])
        for reference in ("floor", "lora"):
            cells[f"peak / {reference}"] = f"{row['peak_bytes'] / rows[reference]['peak_bytes']:.3f}"
        decode = row.get("decode_seconds")  # the floor has none
        cells["decode / base"] = _ratios(decode, results["base"]["decode_seconds"]) if decode else ""
        table.append(cells)
    settings = results["settings"]
    timed = settings["dtype"][0] + CHECKPOINTING[settings["gradient_checkpointing"]]
    kept = ", ".join(f"{size / 1e6:,.1f} MB ({setting})" for setting, size in floor["saved_bytes"].items())
    token = statistics.median(results["base"]["decode_seconds"]) / settings["new_tokens"]
    clock = "processor time" if results["environment"]["device"].endswith("threads") else "elapsed time"
    return (
        f"{results['model']}, batch {settings['batch_size']} x {settings['length']}, "
        f"{results['environment']['device']}. Steps and peak: {timed}. "
        f"Decoding: {settings['dtype'][0]}, batch 1. "
        f"Times: {clock}, median of {settings['rounds']} rounds (quartiles).\n"
        f"The floor keeps {kept}; a step takes {statistics.median(floor['step_seconds']):.3f} s and its peak is "
        f"{floor['peak_bytes'] / 1e6:,.1f} MB with the weights. The base decodes a token in {token * 1e3:.1f} ms.\n\n"
        + tabulate(table, headers="keys", tablefmt="github", disable_numparse=True)
    )


def _ratios(seconds: list[float], reference: list[float]) -> str:
    ratios = [a / b for a, b in zip(seconds, reference, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{median:.3f} ({low:.3f}-{high:.3f})"
