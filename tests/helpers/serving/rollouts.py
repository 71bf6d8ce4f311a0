"""TRL's GRPO trainer on a tiny model."""

import torch
from datasets import Dataset
from tiny import BASES, randomize
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer


PROMPTS = ["max(3,7)=", "min(5,2,8)=", "max(1,4)=", "min(6,9,0,3)="]  # of several lengths, so that rows are padded


class Recorder:
    """Each step's importance ratios: of the training forward's probability of every sampled token to the one that it
    was sampled with."""

    def __init__(self, model: torch.nn.Module):
        self.ratios: list[torch.Tensor] = []
        self.generate, self._sequences, self._logps = model.generate, None, None
        model.generate = self._record_generation
        model.register_forward_hook(self._record_training, with_kwargs=True)

    def _record_generation(self, **kwargs):
        out = self.generate(**kwargs, return_dict_in_generate=True, output_scores=True)
        self._sequences = out.sequences
        scores = torch.stack(out.scores, 1).float()
        sampled = out.sequences[:, -scores.shape[1] :, None]
        self._logps = scores.log_softmax(-1).gather(-1, sampled).squeeze(-1)
        return out.sequences

    def _record_training(self, module, args, kwargs, output):
        if torch.is_grad_enabled():
            same = (kwargs["input_ids"][:, None] == self._sequences).all(-1)  # the trainer shuffles its rollouts
            assert same.any(1).all()
            length = self._logps.shape[1]
            ratio = (output.log_probs.detach()[:, -length:] - self._logps[same.int().argmax(1)]).exp()
            self.ratios.append(ratio[output.label_mask[:, -length:]])  # nothing after an end-of-text token counts


def vowels(completions, **_):
    return [sum(character in "aeiou" for character in text) / 4 + 0.1 * len(text) for text in completions]


def grpo(tiny_llama, output, config, base="fp32", **options):
    """A trainer whose adapter has random weights, and the recorder of its log-probabilities."""
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_llama, **BASES[base]),
        reward_funcs=vowels,
        args=GRPOConfig(
            output_dir=str(output),
            report_to="none",
            use_cpu=True,
            bf16=False,
            seed=3,
            max_steps=2,
            learning_rate=0.1,
            warmup_steps=0,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=6,
            temperature=0.7,
            logging_steps=1,
            save_strategy="no",
            **options,
        ),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
        peft_config=config,
    )
    randomize(trainer.model)
    return trainer, Recorder(trainer.model)
