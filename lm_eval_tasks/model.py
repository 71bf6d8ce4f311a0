"""The harness model `peft-steer`: lm-eval's `hf`, knowing our adapters.

lm-eval 0.4.13 finds it once this module is imported (`peft-steer lm-eval` does so); newer versions find it by the
entry point `lm_eval.models`:

    lm_eval --model peft-steer --model_args pretrained=MODEL,peft=DIR --include_path lm_eval_tasks --tasks listops
"""

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

import peft_steer  # noqa: F401  (registers the tuner types, which is all that `hf` lacks)


@register_model("peft-steer")
class PeftSteerLM(HFLM):
    """`HFLM` with our tuner types registered, so that `peft=ADAPTER_DIR` loads them like any other adapter."""
