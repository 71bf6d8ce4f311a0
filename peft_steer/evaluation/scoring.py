"""A task's own score of a model in memory."""

import logging
from typing import Any

import lm_eval
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask


def score(harness: LM, task: ConfigurableTask, limit: int | None = None, **chat: Any) -> dict[str, Any]:
    """Evaluates a loaded task as lm-eval does.

    Args:
        harness: The model, as lm-eval knows it.
        task: What `peft_steer.evaluation.tasks.load_task` returns.
        limit: Documents to evaluate, None for all.
        **chat: `apply_chat_template` and `system_instruction`, as lm-eval's flags.

    Returns:
        `metric`, the name of the task's first one; `score`; `stderr`, None where lm-eval knows none; `n`, the number
        of documents; `items`, with the hashes of the documents (`ids`) and what the metric has for each (`scores`:
        numbers, except for metrics of a whole corpus).
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its hints are for people who write tasks
    if task.config.num_fewshot is None:
        task.set_config("num_fewshot", 0)  # as `simple_evaluate` does; that one also asks pip for all packages
    name = task.config.task
    chat["fewshot_as_multiturn"] = chat.get("apply_chat_template", False)  # as in training
    output = lm_eval.evaluate(lm=harness, task_dict={"tasks": {name: task}, "groups": {}}, limit=limit, **chat)
    results = output["results"][name]
    key = next(key for key in results if "," in key and "_stderr," not in key)
    metric, filter_name = key.split(",")
    samples = [sample for sample in output["samples"][name] if sample["filter"] == filter_name]
    stderr = results[f"{metric}_stderr,{filter_name}"]
    return {
        "metric": metric,
        "score": results[key],
        "stderr": None if stderr == "N/A" else stderr,
        "n": output["n-samples"][name]["effective"],
        "items": {"ids": [s["doc_hash"] for s in samples], "scores": [s[metric] for s in samples]},
    }
