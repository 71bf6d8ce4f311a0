"""Every analysis of a quantized base finds what it finds of a base with the same weights that is not quantized."""

import json

import pandas as pd
import pytest
from analysis_models import save_tuned
from command_line import peft_steer
from tiny import BASES
from transformers import AutoModelForCausalLM, AutoTokenizer


ANALYSES = {
    "oracle": (["--new_tokens", "4"], ["kl", "final_error"]),
    "linear": (["--ranks", "2", "--new_tokens", "4"], ["kl", "kl_generated"]),
    "where": ([], ["share_mlp", "share_attention", "change"]),
    "first-order": (["--tokens", "3"], ["remainder", "down_share", "outside_down"]),
    "errors": (["--probes", "2", "--iterations", "2"], ["typical", "largest", "energy"]),
}


@pytest.mark.parametrize(
    ("name", "flag"),
    [*((name, "--load_in_4bit") for name in ANALYSES), ("where", "--load_in_8bit"), ("errors", "--load_in_8bit")],
)
def test_quantized(name, flag, tiny_llama, tmp_path):
    precision = {"--load_in_4bit": "nf4", "--load_in_8bit": "int8"}[flag]
    plain, tuned = str(tmp_path / "plain"), save_tuned(tiny_llama, tmp_path / "tuned", "lora")
    AutoModelForCausalLM.from_pretrained(tiny_llama, **BASES[precision]).dequantize().save_pretrained(plain)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(plain)
    (tmp_path / "sums.csv").write_text(
        "prompt,completion\n" + "".join(f"{a}+{b}=,is {a + b}\n" for a in range(6) for b in range(6))
    )
    words, columns = ANALYSES[name]
    found = []
    for base, flags in ((tiny_llama, [flag]), (plain, [])):
        out = tmp_path / f"out{len(found)}"
        arguments = ["--base", base, "--tuned", tuned, "--dataset", str(tmp_path / "sums.csv"), "-o", str(out)]
        assert peft_steer("analyze", name, *arguments, *words, *flags) == 0
        result = json.loads((out / f"{name.replace('-', '_')}.json").read_text())
        assert result[flag.removeprefix("--")] == bool(flags)
        found.append(pd.DataFrame(result["rows"])[columns])
    rtol, atol = (1e-3, 1e-5) if precision == "nf4" else (0.1, 1e-2)  # 8-bit bases round activations, too
    pd.testing.assert_frame_equal(*found, rtol=rtol, atol=atol)
