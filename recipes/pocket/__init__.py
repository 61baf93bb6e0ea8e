"""What the pocket models share: a small language, its tasks, training, measuring, the model card."""
