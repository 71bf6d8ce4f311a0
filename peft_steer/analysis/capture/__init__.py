"""Hidden states and outputs, recorded or replaced while a model runs."""
