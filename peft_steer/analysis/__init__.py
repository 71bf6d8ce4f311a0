"""What steering can and cannot replace: the diagnostics of arXiv 2603.00425 on any base and any fine-tuned model."""
