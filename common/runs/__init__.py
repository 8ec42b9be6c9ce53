"""What is around a run: its folder and record, checkpoints, ranks, signals, sweeps, the regression check."""
