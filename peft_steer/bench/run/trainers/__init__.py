"""What each of TRL's trainers needs of a cell: its data and arguments, and what only it can tell after training."""
