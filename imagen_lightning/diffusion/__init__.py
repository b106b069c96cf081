"""The mathematics of diffusion, free of Lightning."""

from imagen_lightning.diffusion.augmentation import LowResAugmentation
from imagen_lightning.diffusion.guidance import guide
from imagen_lightning.diffusion.parametrizations import X0, Epsilon, Flow, Parametrization, V
from imagen_lightning.diffusion.process import DiffusionProcess
from imagen_lightning.diffusion.schedules import CosineSchedule, FlowSchedule, ShiftedCosineSchedule
from imagen_lightning.diffusion.thresholding import (
    DynamicThresholding,
    NoThresholding,
    StaticThresholding,
    Thresholding,
    threshold,
)
from imagen_lightning.diffusion.weightings import MinSNR, Plain, Weighting

__all__ = [
    "X0",
    "CosineSchedule",
    "DiffusionProcess",
    "DynamicThresholding",
    "Epsilon",
    "Flow",
    "FlowSchedule",
    "LowResAugmentation",
    "MinSNR",
    "NoThresholding",
    "Parametrization",
    "Plain",
    "ShiftedCosineSchedule",
    "StaticThresholding",
    "Thresholding",
    "V",
    "Weighting",
    "guide",
    "threshold",
]
