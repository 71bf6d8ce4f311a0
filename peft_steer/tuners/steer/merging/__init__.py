"""Edits in other places than their own: in a linear layer's weights, or, summed, in one adapter."""
