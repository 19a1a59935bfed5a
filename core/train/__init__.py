"""Training on cached latents: what to train on, what to train, the loop, its files."""
