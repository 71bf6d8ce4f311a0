"""A page to play with adapters: base and steered side by side, with a slider for the strength. `peft-steer play`."""
