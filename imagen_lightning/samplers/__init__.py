"""Samplers: `sampler(denoise, x, times, *, schedule, generator)`, one algorithm a file."""

from imagen_lightning.samplers.ddim import DDIM
from imagen_lightning.samplers.ddpm import DDPM
from imagen_lightning.samplers.dpmpp import DPMSolverPP
from imagen_lightning.samplers.spacings import LogSNRTimes, UniformTimes

__all__ = ["DDIM", "DDPM", "DPMSolverPP", "LogSNRTimes", "UniformTimes"]
