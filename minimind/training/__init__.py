"""Training: the trainer and its stages, run folders, checkpoints, optimizers and parallelism."""
