"""Tasks and a model for lm-evaluation-harness: each folder is one task (YAML, README, its data)."""
