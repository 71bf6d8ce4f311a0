"""Tasks of lm-evaluation-harness as training data, rewards and scores, and the harness model for steering adapters."""
