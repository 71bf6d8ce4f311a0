"""A task's own score of models in memory."""

import argparse
import logging
from collections.abc import Mapping
from typing import Any

import lm_eval
from torch import nn
from transformers import PreTrainedTokenizerBase

from lm_eval_tasks.model import PeftSteerLM
from peft_steer import tasks


def accuracies(
    models: Mapping[str, nn.Module], tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """For each model lm-eval's first metric of `args.task`, its standard error and the number of documents, at most
    `args.limit`."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its hints are for people who write tasks
    task, manager = tasks.load_task(args.task, args.include_path, args.num_fewshot)
    found = {}
    for name, model in models.items():
        output = lm_eval.simple_evaluate(
            model=PeftSteerLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size),
            tasks=[task],
            limit=args.limit,
            task_manager=manager,
            log_samples=False,
        )
        scores = output["results"][args.task]
        key = next(key for key in scores if "," in key and "_stderr," not in key)
        metric, filter_name = key.split(",")
        found[name] = {
            metric: scores[key],
            "stderr": scores[f"{metric}_stderr,{filter_name}"],
            "n": output["n-samples"][args.task]["effective"],
        }
    return found
