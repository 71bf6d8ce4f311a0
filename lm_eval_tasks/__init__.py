"""Tasks and a model for lm-evaluation-harness. Each folder has tasks (YAML), a README, and what makes their data."""
