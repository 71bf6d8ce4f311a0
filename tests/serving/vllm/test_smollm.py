"""A trained model of ordinary size."""

from engines import difference, load, run_engine, save_adapter
from transformers import AutoTokenizer

from peft_steer.utils.hub import DEMO_MODEL, find_model


def test_log_probabilities(tmp_path):
    base = find_model(DEMO_MODEL).path
    adapter = save_adapter(base, tmp_path / "adapter", kind="nonlinear", r=8, std=0.02)
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = ("The capital of France is", "def add(a, b):\n    return", "Once upon a time there was a king who")
    requests = [[tokenizer(text).input_ids, None] for text in texts]
    asked = {"peft_steer": {"adapter": adapter}}
    found = run_engine(tmp_path, base, [requests], additional_config=asked, skip_tokenizer_init=False)
    assert found["error"] is None, found["log"]
    error = difference(load(base, adapter), requests, found["rounds"][0])
    print(f"steered {error:.1e}, against the base {difference(load(base), requests, found['rounds'][0]):.2f}")
    assert error < 1e-3
    assert difference(load(base), requests, found["rounds"][0]) > 0.1
