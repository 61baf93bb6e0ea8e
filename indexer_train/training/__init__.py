"""The training loop: the stock trainer, checkpoints, tracking. Nothing else imports it but the command line."""
