"""Cells that are trained by reinforcement and by preference: what is recorded, saved, and kept of a killed run."""
