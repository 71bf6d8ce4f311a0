"""The comparison of PEFT methods on one task: plan a grid, run one cell, collect, report."""
