"""`peft-steer serve`: adapters by name over HTTP, loaded and unloaded while it runs."""

import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from command_line import peft_steer
from engines import environment, load, reference, save_adapter, save_model

from peft_steer.serving.vllm import serve


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    kinds = {"silu": {"kind": "nonlinear"}, "vector": {"kind": "vector"}, "mlp": {"kind": "loreft", "site": "mlp"}}
    return {name: save_adapter(base, folder / name, **config) for name, config in kinds.items()}


def test_the_command(base, adapters, tmp_path, capsys):
    words = serve.command(base, adapters, 3, 9, ["--dtype", "float32"])
    assert words[words.index("--additional-config") + 1] == '{"peft_steer": {"sites": ["block", "mlp"]}}'
    assert words[words.index("--max-lora-rank") + 1] == "8"
    assert words[words.index("--lora-target-modules") + 1] == "steering"
    assert "--no-enable-prefix-caching" not in words
    named = [word for name, path in adapters.items() for word in ("--adapter", f"{name}={path}")]
    assert serve.main([base, *named, "--port", "9", "--dry-run", "--", "--dtype", "float32"]) == 0
    assert shlex.split(capsys.readouterr().out) == ["VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", *words]
    joint = save_adapter(base, tmp_path / "joint", method="joint", kind="nonlinear", r=9)
    prompt = save_adapter(base, tmp_path / "prompt", positions="prompt")
    words = serve.command(base, {"joint": joint, "prompt": f"{prompt}@2"}, 1, 9, [])
    assert words[words.index("--max-lora-rank") + 1] == "16"
    assert "--lora-target-modules" not in words
    assert "--no-enable-prefix-caching" in words


def test_mistakes(base, tmp_path, capsys):
    heads = save_adapter(base, tmp_path / "heads", site="heads", kind="vector")
    cases = {
        "must be NAME=DIR": ["--adapter", "x"],
        "there is no adapter in": ["--adapter", "x=/nowhere"],
        "does not steer site='heads'": ["--adapter", f"x={heads}"],
        "two adapters have one name": ["--adapter", f"x={heads}", "--adapter", f"x={heads}"],
        "--slots 0": ["--slots", "0"],
    }
    for message, arguments in cases.items():
        assert peft_steer("serve", base, "--dry-run", *arguments) == 2
        assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def server(base, adapters, tmp_path_factory):
    variables = environment()
    port = int(variables["MASTER_PORT"]) + 1
    named = {"silu": adapters["silu"], "half": f"{adapters['silu']}@0.5", "vector": adapters["vector"]}
    words = [sys.executable, "-m", "peft_steer.commands.cli", "serve", base, "--slots", "4", "--port", str(port)]
    words += [word for name, path in named.items() for word in ("--adapter", f"{name}={path}")]
    words += ["--", "--dtype", "float32", "--max-model-len", "96", "--max-num-seqs", "8", "--host", "127.0.0.1"]
    words += ["--served-model-name", "base", "--max-cpu-loras", "8"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            words,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=variables,
        )
    try:
        for _ in range(900):
            assert process.poll() is None, log.read_text()[-8000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(1)
        else:
            pytest.fail(log.read_text()[-8000:])
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def test_served_by_name(server, base, adapters):
    """Requests at once, each with its adapter's log-probabilities; a streamed chat; loading, refusing, unloading."""
    from openai import OpenAI
    from transformers import AutoTokenizer

    client = OpenAI(base_url=server, api_key="none")
    tokenizer = AutoTokenizer.from_pretrained(base)
    models = {
        "base": load(base),
        "silu": load(base, adapters["silu"]),
        "half": load(base, adapters["silu"], 0.5),
        "vector": load(base, adapters["vector"]),
    }

    def ask(i: int) -> tuple[str, list[int], list[int], torch.Tensor]:
        name, prompt = list(models)[i % 4], tokenizer(f"This is text {i}, ").input_ids
        answer = client.completions.create(
            model=name,
            prompt=prompt,
            max_tokens=6,
            temperature=0,
            logprobs=1,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        tokens = answer.choices[0].model_dump()["token_ids"]
        return name, prompt, tokens, torch.tensor(answer.choices[0].logprobs.token_logprobs, dtype=torch.float64)

    with ThreadPoolExecutor(8) as pool:
        for name, prompt, tokens, logps in pool.map(ask, range(16)):
            expected = reference(models[name], prompt, tokens, with_prompt=False)
            torch.testing.assert_close(logps, expected, atol=1e-4, rtol=0)
            if name != "base":
                assert (reference(models["base"], prompt, tokens, with_prompt=False) - logps).abs().max() > 0.05

    stream = client.chat.completions.create(
        model="silu", messages=[{"role": "user", "content": "Hello"}], max_tokens=5, temperature=0, stream=True
    )
    streamed = "".join(part.choices[0].delta.content or "" for part in stream if part.choices)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], return_tensors="pt", return_dict=True)
    out = models["silu"].generate(**ids, max_new_tokens=5, do_sample=False)
    assert streamed == tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    assert {model.id for model in client.models.list()} == set(models)
    client.post("/load_lora_adapter", cast_to=str, body={"lora_name": "later", "lora_path": adapters["vector"]})
    assert "later" in {model.id for model in client.models.list()}
    with pytest.raises(Exception, match="no slots: it was opened for the sites"):
        client.post("/load_lora_adapter", cast_to=str, body={"lora_name": "mlp", "lora_path": adapters["mlp"]})
    client.post("/unload_lora_adapter", cast_to=str, body={"lora_name": "later"})
    assert {model.id for model in client.models.list()} == set(models)
