"""The mathematics of diffusion, free of Lightning."""

from imagen_lightning.diffusion.augmentation import LowResAugmentation
from imagen_lightning.diffusion.guidance import guide
from imagen_lightning.diffusion.parametrizations import X0, Epsilon, Flow, Parametrization, V
from imagen_lightning.diffusion.process import DiffusionProcess
from imagen_lightning.diffusion.schedules import (
    CosineSchedule,
    DiscreteSchedule,
    FlowSchedule,
    LinearSchedule,
    ShiftedCosineSchedule,
    SigmoidSchedule,
)
from imagen_lightning.diffusion.thresholding import (
    DynamicThresholding,
    NoThresholding,
    StaticThresholding,
    Thresholding,
    threshold,
)
from imagen_lightning.diffusion.times import EvenTimes, LogitNormalTimes, LogNormalTimes, TrainingTimes
from imagen_lightning.diffusion.variance import FixedVariance, LearnedRange
from imagen_lightning.diffusion.weightings import P2, MinSNR, Plain, SigmoidWeighting, TruncatedSNR, Weighting

__all__ = [
    "P2",
    "X0",
    "CosineSchedule",
    "DiffusionProcess",
    "DiscreteSchedule",
    "DynamicThresholding",
    "Epsilon",
    "EvenTimes",
    "FixedVariance",
    "Flow",
    "FlowSchedule",
    "LearnedRange",
    "LinearSchedule",
    "LogNormalTimes",
    "LogitNormalTimes",
    "LowResAugmentation",
    "MinSNR",
    "NoThresholding",
    "Parametrization",
    "Plain",
    "ShiftedCosineSchedule",
    "SigmoidSchedule",
    "SigmoidWeighting",
    "StaticThresholding",
    "Thresholding",
    "TrainingTimes",
    "TruncatedSNR",
    "V",
    "Weighting",
    "guide",
    "threshold",
]
