"""One engine of vLLM in a process of its own: `python engine_worker.py SPEC.json RESULT.json`.

vLLM keeps global state, and an engine that fails leaves it behind; so a test never makes one in its own process.
"""

import json
import sys
import time


def outputs(llm, requests, ids, max_tokens, prompt_logprobs):
    """Of each request the tokens that were generated, their log-probabilities and those of the prompt's tokens."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    sampling = SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        logprobs=0,
        prompt_logprobs=0 if prompt_logprobs else None,
        ignore_eos=True,
    )
    answers = llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _ in requests],
        sampling,
        lora_request=[LoRARequest(path, ids[path], path) if path else None for _, path in requests] if ids else None,
        use_tqdm=False,
    )
    found = []
    for answer in answers:
        out = answer.outputs[0]
        tokens = list(out.token_ids)
        logps = [step[token].logprob for token, step in zip(tokens, out.logprobs, strict=True)]
        if prompt_logprobs:
            prompt = list(answer.prompt_token_ids)[1:]
            logps = [s[t].logprob for t, s in zip(prompt, answer.prompt_logprobs[1:], strict=True)] + logps
        found.append({"tokens": tokens, "logps": logps})
    return found


def reload(llm, file):
    """Push the tensors of a file as to a server in training; with None, load the base from its checkpoint again."""
    from safetensors.torch import load_file

    pushed = {} if file is None else {"weights_iterator": iter(load_file(file).items())}
    llm.collective_rpc("reload_weights", kwargs=pushed)
    llm.reset_prefix_cache()


def main(spec_file, result_file):
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    with open(spec_file) as file:
        spec = json.load(file)
    paths = {path for requests in spec["rounds"] if isinstance(requests, list) for _, path in requests if path}
    ids = {path: i for i, path in enumerate(sorted(paths), start=1)}
    start = time.perf_counter()
    result = {"error": None, "rounds": []}
    try:
        llm = LLM(**spec["engine"])
        result["seconds"] = time.perf_counter() - start
        for requests in spec["rounds"]:
            try:
                if isinstance(requests, str):  # an adapter to be loaded, as a server loads it
                    answers = llm.llm_engine.add_lora(LoRARequest(requests, 100 + len(result["rounds"]), requests))
                elif isinstance(requests, dict):
                    answers = reload(llm, requests["reload"])
                else:
                    answers = outputs(llm, requests, ids, spec["max_tokens"], spec["prompt_logprobs"])
            except Exception as error:  # what a user would see is what the test looks at
                answers = {"error": str(error)}
            result["rounds"].append(answers)
    except Exception as error:
        result["error"] = str(error)
    result["modules"] = sorted({name.partition(".")[0] for name in sys.modules})
    with open(result_file, "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
