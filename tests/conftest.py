"""Settings shared by every test."""

import os

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import imagen_lightning.torchvision_mend  # noqa: F401  (before anything imports lightning)
