"""What one cell does, in one process or in several."""
