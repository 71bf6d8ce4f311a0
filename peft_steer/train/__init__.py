"""`peft-steer sft`, `grpo` and `dpo`: TRL's trainers, unchanged, on recipes."""
