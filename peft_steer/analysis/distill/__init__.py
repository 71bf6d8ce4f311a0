"""`peft-steer distill`: a tuned model as a steering adapter."""
