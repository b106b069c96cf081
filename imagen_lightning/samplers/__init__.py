"""Samplers: `sampler(denoise, x, times, *, schedule, generator)`, one algorithm a file."""

from imagen_lightning.samplers.ddim import DDIM
from imagen_lightning.samplers.ddpm import DDPM
from imagen_lightning.samplers.dpmpp import DPMSolverPP, DPMSolverPPSDE
from imagen_lightning.samplers.heun import Heun
from imagen_lightning.samplers.spacings import (
    KarrasTimes,
    LeadingTimes,
    LinspaceTimes,
    ListedTimes,
    LogSNRTimes,
    TrailingTimes,
    UniformTimes,
)

__all__ = [
    "DDIM",
    "DDPM",
    "DPMSolverPP",
    "DPMSolverPPSDE",
    "Heun",
    "KarrasTimes",
    "LeadingTimes",
    "LinspaceTimes",
    "ListedTimes",
    "LogSNRTimes",
    "TrailingTimes",
    "UniformTimes",
]
