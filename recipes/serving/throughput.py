"""
What steering costs in vLLM: tokens per second of processor time, of the base and with adapters.

    python recipes/serving/throughput.py --model HuggingFaceTB/SmolLM2-135M-Instruct

Each engine runs in a process of its own, in turns, `--repeat` times; the table has medians over all rounds. The time
is that of the process (`time.process_time`), which other work on the machine disturbs less than the clock.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from peft_steer.utils.hub import find_model


# name: (adapters in a batch, compiled)
ENGINES = {
    "base": (None, True),
    "one adapter for all requests": (0, True),
    "base, eager": (None, False),
    "1 adapter per request": (1, False),
    "8 adapters per request": (8, False),
    "32 adapters per request": (32, False),
}


def measure(name: str, model: str, adapters: list[str], rows: int, tokens: int, rounds: int) -> list[float]:
    """Tokens per second of processor time, of each round, in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # all in this process, whose time is taken
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    number, compiled = ENGINES[name]
    options: dict = {"distributed_executor_backend": "uni"}
    if number == 0:
        options |= {"additional_config": {"peft_steer": {"adapter": adapters[0]}}}
    elif number is not None:
        options |= {
            "additional_config": {"peft_steer": {"sites": ["block"]}},
            "enable_lora": True,
            "max_loras": number,
        }
        options |= {"max_lora_rank": 8, "max_cpu_loras": number, "lora_target_modules": ["steering"]}
    llm = LLM(model, dtype="float32", max_model_len=256, max_num_seqs=rows, enforce_eager=not compiled, **options)
    requests = None
    if number:
        requests = [LoRARequest(str(i % number), 1 + i % number, adapters[i % number]) for i in range(rows)]
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=1.0, seed=0)
    rates = []
    for i in range(rounds + 1):
        prompts = [f"Round {i}, text {row}: the quick brown fox jumps over" for row in range(rows)]
        start = time.process_time()
        llm.generate(prompts, sampling, lora_request=requests, use_tqdm=False)
        rates.append(rows * tokens / (time.process_time() - start))
    return rates[1:]  # without the warm-up


def make_adapters(model: str, folder: str, number: int) -> list[str]:
    """Random post-block adapters of rank 8."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from peft_steer import PostBlockSteerConfig

    steered = get_peft_model(AutoModelForCausalLM.from_pretrained(model), PostBlockSteerConfig(task_type="CAUSAL_LM"))
    made = []
    for i in range(number):
        with torch.no_grad():
            for p in steered.parameters():
                if p.requires_grad:
                    p.normal_(std=0.01)
        made.append(f"{folder}/{i}")
        steered.save_pretrained(made[-1])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--adapters", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    model = find_model(args.model).path
    if args.engine:
        print(json.dumps(measure(args.engine, model, args.adapters, args.rows, args.tokens, args.rounds)))
        return
    speeds: dict[str, list[float]] = {name: [] for name in ENGINES}
    with tempfile.TemporaryDirectory() as folder:
        adapters = make_adapters(model, folder, max(number or 0 for number, _ in ENGINES.values()))
        for _ in range(args.repeat):
            for name in ENGINES:
                words = [sys.executable, __file__, "--model", args.model, "--engine", name, "--adapters", *adapters]
                words += ["--rows", str(args.rows), "--tokens", str(args.tokens), "--rounds", str(args.rounds)]
                done = subprocess.run(words, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr[-4000:])
                speeds[name] += json.loads(done.stdout.splitlines()[-1])
                print(name, [round(x) for x in speeds[name]], file=sys.stderr, flush=True)
    print("| engine | tokens per processor-second | of the base's |\n|---|---|---|")
    for name, rates in speeds.items():
        base = speeds["base" if ENGINES[name][1] else "base, eager"]
        speed = statistics.median(rates)
        print(f"| {name} | {speed:.0f} | {speed / statistics.median(base):.2f} |")


if __name__ == "__main__":
    main()
