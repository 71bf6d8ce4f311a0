"""
An OpenAI-compatible server for steering adapters, joint adapters and LoRAs on one base, each by its name.

    peft-steer serve HuggingFaceTB/SmolLM2-135M-Instruct --adapter polite=results/a --adapter brief=results/b@0.5
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \
        -d '{"model": "polite", "messages": [{"role": "user", "content": "Hello"}]}'

`NAME=DIR` is a directory that PEFT saved, `NAME=DIR@0.5` the same at half its strength; the base itself answers to
its own name. What follows `--` goes to vLLM. The command is vLLM's own with the right options: it is printed, and can
be run without this one, wherever peft-steer is installed.
"""

import argparse
import importlib.util
import json
import os
import shlex
import sys
from pathlib import Path

from peft import PeftConfig

from peft_steer import JointSteerLoraConfig, SteerConfig
from peft_steer.utils.errors import UsageError, usage_errors
from peft_steer.utils.hub import find_model


_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM has
SITES = ("block", "mlp", "attention")


def command(model: str, adapters: dict[str, str], slots: int, port: int, more: list[str]) -> list[str]:
    """The words of vLLM's command.

    Args:
        model: a directory or a hub id.
        adapters: by name, a directory, with `@` and a strength if that is not 1.
        slots: how many adapters can be in one batch.
        port: where it listens.
        more: options for vLLM.

    Raises:
        ValueError: if an adapter cannot be served; names it.
    """
    sites, rank, lora, positions = set(), 1, False, False
    for name, path in adapters.items():
        directory = path if Path(path).is_dir() else path.rpartition("@")[0]
        if not (Path(directory) / "adapter_config.json").is_file():
            raise ValueError(f"--adapter {name}={path}: there is no adapter in {directory or path!r}.")
        config = PeftConfig.from_pretrained(directory)
        joint = isinstance(config, JointSteerLoraConfig)
        if joint or isinstance(config, SteerConfig):
            steer = config.steer_config() if joint else config
            if set(steer.sites) - set(SITES):
                raise ValueError(f"--adapter {name}={path}: vLLM does not steer site={steer.site!r}.")
            sites |= set(steer.sites)
            doubled = 2 if steer.kind == "noreft" and steer.activation else 1  # see `Noreft.low_rank`
            rank = max(rank, doubled * max([steer.r, *steer.rank_pattern.values()]))
            positions = positions or steer.positions != "all"
        if not isinstance(config, SteerConfig):
            lora = True
            rank = max([rank, config.r, *config.rank_pattern.values()])
    fitting = [r for r in _RANKS if r >= rank]
    if not fitting:
        raise ValueError(f"an adapter has rank {rank}, vLLM's largest is {_RANKS[-1]}.")
    steering = {"peft_steer": {"sites": [site for site in SITES if site in sites or not sites]}}
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    words += ["--enable-lora", "--max-loras", str(slots), "--max-cpu-loras", str(max(slots, len(adapters)))]
    words += ["--max-lora-rank", str(fitting[0]), "--additional-config", json.dumps(steering)]
    if adapters and not lora:  # the base's own layers need no slots
        words += ["--lora-target-modules", "steering"]
    if positions:  # a cached prefix may have been computed where another of its tokens was steered
        words += ["--no-enable-prefix-caching"]
    if adapters:
        words += ["--lora-modules", *(f"{name}={path}" for name, path in adapters.items())]
    return words + more


def main(argv: list[str]) -> int:
    """Prints vLLM's command and becomes it; 2 if the arguments cannot be used."""
    end = argv.index("--") if "--" in argv else len(argv)
    own, more = argv[:end], argv[end + 1 :]
    parser = argparse.ArgumentParser(
        prog="peft-steer serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="the base: a directory or a hub id")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=DIR[@STRENGTH]", help="repeatable")
    parser.add_argument("--slots", type=int, help="adapters in one batch (default: all that are named, at least 1)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--dry-run", action="store_true", help="print vLLM's command only")
    arguments = parser.parse_args(own)
    with usage_errors():
        adapters = dict(_named(text) for text in arguments.adapter)
        if len(adapters) < len(arguments.adapter):
            raise UsageError("--adapter: two adapters have one name.")
        slots = max(len(adapters), 1) if arguments.slots is None else arguments.slots
        if slots < 1:
            raise UsageError(f"--slots {slots}: must be at least 1.")
        if not arguments.dry_run and importlib.util.find_spec("vllm") is None:
            raise UsageError("vLLM is not installed: `pip install 'peft-steer[vllm]'` and the build for this machine.")
        source = find_model(arguments.model)
        words = command(source.path, adapters, slots, arguments.port, more)
        if source.path != arguments.model and "--served-model-name" not in more:
            words += ["--served-model-name", arguments.model]
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}  # adapters come and go over HTTP
    print(" ".join(f"{name}={value}" for name, value in environment.items()), shlex.join(words), flush=True)
    if arguments.dry_run:
        return 0
    os.execve(words[0], words, {**os.environ, **environment})


def _named(text: str) -> tuple[str, str]:
    name, mark, path = text.partition("=")
    if not (name and mark and path):
        raise ValueError(f"--adapter {text}: must be NAME=DIR or NAME=DIR@STRENGTH.")
    return name, path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
