"""One training of TRL's with rollouts by vLLM, in a process of its own: `rollout_worker.py SPEC.json RESULT.json`.

TRL is not changed, but for the size of its engine.
"""

import json
import sys

import torch
from datasets import Dataset
from tiny import METHODS, randomize
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


PROMPTS = ["max(3,7)=", "min(5,2,8)=", "max(1,4)=", "min(6,9,0,3)="]


def vowels(completions, **_):
    return [sum(character in "aeiou" for character in text) / 4 + 0.1 * len(text) for text in completions]


def make_trainer(spec):
    import trl.experimental.online_dpo.online_dpo_trainer as online_dpo
    import trl.generation.vllm_generation as generation
    from vllm import LLM

    ours = {"max_num_seqs": 16, **spec.get("engine", {"enforce_eager": True})}
    # For a 4-bit model TRL asks for an engine in 4 bit, which vLLM has on GPUs alone.
    generation.LLM = lambda **options: LLM(**{**options, **ours, "quantization": None})
    online_dpo.LLM = generation.LLM
    options = {
        "output_dir": spec["output"],
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "seed": 3,
        "max_steps": 4,
        "learning_rate": 0.05,
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "temperature": 0.7,
        "use_vllm": True,
        "vllm_mode": "colocate",
        "gradient_checkpointing": False,
        **spec.get("options", {}),
    }
    kwargs = {}
    if spec.get("base") == "nf4":
        kwargs["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    else:
        kwargs["dtype"] = torch.float32
    data = Dataset.from_dict({"prompt": PROMPTS * 4})
    common = {
        "model": AutoModelForCausalLM.from_pretrained(spec["model"], **kwargs),
        "train_dataset": data,
        "processing_class": AutoTokenizer.from_pretrained(spec["model"]),
        "peft_config": METHODS[spec.get("method", "steer")](**{"r": 4, "task_type": "CAUSAL_LM", **spec["config"]}),
        "reward_funcs": vowels,
    }
    if spec["trainer"] == "online_dpo":
        from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

        options |= {"max_new_tokens": 8, "vllm_gpu_memory_utilization": 0.1}
        trainer = OnlineDPOTrainer(args=OnlineDPOConfig(**options), **common)
    else:
        from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

        config, trainer = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}[spec["trainer"]]
        options |= {"num_generations": 2, "max_completion_length": 8, "vllm_max_model_length": 64}
        trainer = trainer(args=config(**options), **common)
    if spec.get("randomize", True):
        randomize(trainer.model, std=spec.get("std", 0.3))
    return trainer


@torch.no_grad()
def compare(trainer, llm):
    """Log-probabilities of a text by the engine, as it is now, the trained model and the base."""
    from vllm import SamplingParams

    tokenizer = trainer.processing_class
    ids = tokenizer("max(3,7)=7 and so on").input_ids
    out = llm.generate([{"prompt_token_ids": ids}], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    engine = torch.tensor([s[t].logprob for t, s in zip(ids[1:], out[0].prompt_logprobs[1:], strict=True)])
    model = trainer.accelerator.unwrap_model(trainer.model).eval()

    def logps():
        logits = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
        return logits.gather(-1, torch.tensor(ids)[1:, None])[:, 0]

    policy = logps()
    with model.disable_adapter():
        base = logps()
    return {"policy": (engine - policy).abs().max().item(), "base": (engine - base).abs().max().item()}


def main(spec_file, result_file):
    with open(spec_file) as file:
        spec = json.load(file)
    result = {"error": None}
    try:
        trainer = make_trainer(spec)
        if "before" in spec:  # what a test changes
            exec(spec["before"], {"trainer": trainer})
        trainer.train(resume_from_checkpoint=spec.get("resume"))
        result["history"] = trainer.state.log_history
        if "save" in spec:
            trainer.save_model(spec["save"])
        if trainer.args.use_vllm:
            generation = getattr(trainer, "vllm_generation", None)
            generation.sync_weights() if generation is not None else trainer._move_model_to_vllm()
            result |= compare(trainer, generation.llm if generation is not None else trainer.llm)
    except Exception as error:  # which a test expects
        result["error"] = f"{type(error).__name__}: {error}"
    if "trainer" in locals():
        result["left"] = [name for name, _ in trainer.model.named_parameters() if ".live_" in name]
    with open(result_file, "w") as file:
        json.dump(result, file, default=str)


if __name__ == "__main__":
    main(*sys.argv[1:])
