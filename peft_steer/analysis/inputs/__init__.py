"""What the analyses read: a pair of base and tuned model, and texts."""
