"""Experiments with cascaded pixel diffusion from text, on PyTorch Lightning."""

__version__ = "0.1.0"
