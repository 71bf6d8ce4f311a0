"""The tuners that this package adds to PEFT."""
