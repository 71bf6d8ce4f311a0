"""Moments, regressions, distances and derivatives."""
