"""`peft-steer lm-eval` on our tasks alone, which spares each process lm-eval's thousands of files."""

import sys
from functools import partial

import lm_eval.evaluator

from peft_steer.commands import lm_eval as harness


if __name__ == "__main__":
    harness._TaskManager = partial(harness._TaskManager, include_defaults=False)
    lm_eval.evaluator.add_env_info = lambda results: None  # which asks pip for all packages
    sys.exit(harness.main(sys.argv[1:]))
