"""Training steps, objectives and checkpoints, in a loop that can be stopped."""
