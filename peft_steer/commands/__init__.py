"""`peft-steer ...`: the command line, and the one place that reports a user's error."""
