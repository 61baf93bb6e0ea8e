"""Shared settings and models of the suite."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

from hypothesis import settings

settings.register_profile("suite", deadline=None)
settings.load_profile("suite")
