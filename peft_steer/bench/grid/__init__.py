"""What a grid means: its file, the candidates and the order in which cells run."""
