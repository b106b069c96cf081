"""The stages of a cascade, as LightningModules over one mixin."""

from imagen_lightning.stages.base import BaseStage
from imagen_lightning.stages.mixin import DiffusionMixin, StepRecord
from imagen_lightning.stages.optimization import Optimization
from imagen_lightning.stages.settings import Diffusion, Execution, Sampling, TextSettings
from imagen_lightning.stages.super_resolution import SuperResolutionStage

__all__ = [
    "BaseStage",
    "Diffusion",
    "DiffusionMixin",
    "Execution",
    "Optimization",
    "Sampling",
    "StepRecord",
    "SuperResolutionStage",
    "TextSettings",
]
