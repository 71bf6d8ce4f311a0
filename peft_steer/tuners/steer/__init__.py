"""Steering: edits of hidden states at one or more places of every chosen block."""
