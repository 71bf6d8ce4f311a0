"""The notebook about vLLM, whose figures are what its text says."""

import re

from notebooks import EXAMPLES, run


def test_the_notebook_runs_and_the_engine_answers_as_the_adapters(tmp_path):
    printed = run(EXAMPLES / "serve_with_vllm.ipynb", tmp_path)
    found = re.findall(r"at most (\S+) from the adapter in transformers, up to (\S+) from the base", printed)
    assert len(found) == 2, printed
    for error, control in found:
        assert float(error) < 1e-4
        assert float(control) > 1
