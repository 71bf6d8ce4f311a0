"""What is added to a hidden state: one small module for each equation."""
