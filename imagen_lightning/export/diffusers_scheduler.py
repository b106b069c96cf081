"""diffusers' schedulers for DeepFloyd IF, to and from a stage's schedule, parametrization and sampling.

Two are known: DDPMScheduler and DPMSolverMultistepScheduler. Nothing here needs diffusers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from imagen_lightning.diffusion import (
    X0,
    DiscreteSchedule,
    DynamicThresholding,
    Epsilon,
    FixedVariance,
    LearnedRange,
    NoThresholding,
    Parametrization,
    StaticThresholding,
    Thresholding,
    V,
)
from imagen_lightning.samplers import DDPM, DPMSolverPP, DPMSolverPPSDE, LeadingTimes, LinspaceTimes, TrailingTimes
from imagen_lightning.stages import Diffusion, Sampling
from imagen_lightning.types import InputError, Sampler, Schedule, Spacing

# The schedulers' own defaults, which a scheduler_config.json may leave out.
TABLE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}
THRESHOLDING: dict[str, Any] = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
DDPM_DEFAULTS: dict[str, Any] = {
    **TABLE,
    **THRESHOLDING,
    "variance_type": "fixed_small",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
}
DPM_DEFAULTS: dict[str, Any] = {
    **TABLE,
    **THRESHOLDING,
    "solver_order": 2,
    "prediction_type": "epsilon",
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "lower_order_final": True,
    "euler_at_final": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -math.inf,
    "variance_type": None,
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}
# What a field must be, since the samplers here know nothing else; clip_sample_range only where it is read.
REQUIRED: dict[str, Any] = {
    "rescale_betas_zero_snr": False,
    "solver_order": 2,
    "solver_type": "midpoint",
    "euler_at_final": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "final_sigmas_type": "zero",
    "use_dynamic_shifting": False,
}
# Of earlier DDPMSchedulers, which read it; any other value of it changes the samples.
REQUIRED_EARLIER: dict[str, Any] = {"predict_epsilon": True}
LOWER_ORDER_BELOW = 15  # of DPMSolverMultistepScheduler, where lower_order_final

PREDICTIONS: dict[str, type[Parametrization]] = {"epsilon": Epsilon, "v_prediction": V, "sample": X0}
VARIANCES = {"learned_range": "learned", "fixed_small": "small", "fixed_large": "large"}
SOLVERS: dict[str, type[DPMSolverPP] | type[DPMSolverPPSDE]] = {
    "dpmsolver++": DPMSolverPP,
    "sde-dpmsolver++": DPMSolverPPSDE,
}


@dataclass(frozen=True)
class SchedulerSettings:
    """What a scheduler says of a stage."""

    schedule: DiscreteSchedule
    parametrization: Parametrization
    variance: LearnedRange | FixedVariance
    sampler: Sampler
    spacing: Spacing
    thresholding: Thresholding


def read_scheduler(config: Mapping[str, Any], what: str) -> SchedulerSettings:
    """A stage's settings from a scheduler_config.json.

    Args:
        config: the file's content.
        what: names the file in messages.

    Fields that the scheduler does not read are passed over, named in one warning: those of the other class, which a
    scheduler that diffusers made from its config keeps (published DeepFloyd IF has `lambda_min_clipped` in its
    DDPMScheduler), and any that neither class has.

    Raises:
        InputError: a scheduler other than the two, or a field with a value that the samplers here cannot have; all such
            fields are named.
    """
    kind = config.get("_class_name")
    if kind not in ("DDPMScheduler", "DPMSolverMultistepScheduler"):
        raise InputError(f"{what} is of {kind!r}; DDPMScheduler and DPMSolverMultistepScheduler can be read")
    full, wrong = _filled(config, DDPM_DEFAULTS if kind == "DDPMScheduler" else DPM_DEFAULTS)
    spacings = ("leading", "trailing") if kind == "DDPMScheduler" else ("linspace",)
    _check(full, "prediction_type", tuple(PREDICTIONS), wrong)
    _check(full, "timestep_spacing", spacings, wrong)
    if kind == "DDPMScheduler":
        _check(full, "variance_type", tuple(VARIANCES), wrong)
        if full["clip_sample"] and not full["thresholding"]:
            _check(full, "clip_sample_range", (1.0,), wrong)
    else:
        _check(full, "variance_type", ("learned_range", None), wrong)
        _check(full, "algorithm_type", tuple(SOLVERS), wrong)
    if full["timestep_spacing"] != "leading":
        _check(full, "steps_offset", (0,), wrong)
    if wrong:
        raise InputError(f"{what} cannot be followed: {'; '.join(wrong)}")
    _tell_unread(config, full, what)

    learned = full["variance_type"] == "learned_range"
    thresholding: Thresholding = NoThresholding()
    if full["thresholding"]:
        thresholding = DynamicThresholding(full["dynamic_thresholding_ratio"], full["sample_max_value"])
    elif full.get("clip_sample"):
        thresholding = StaticThresholding()
    sampler: Sampler
    spacing: Spacing
    if kind == "DDPMScheduler":
        sampler = DDPM(VARIANCES[full["variance_type"]])
        leading = full["timestep_spacing"] == "leading"
        spacing = LeadingTimes(full["steps_offset"]) if leading else TrailingTimes()
    else:
        sampler = SOLVERS[full["algorithm_type"]](LOWER_ORDER_BELOW if full["lower_order_final"] else 0)
        lowest = float(full["lambda_min_clipped"])
        spacing = LinspaceTimes(None if lowest == -math.inf else lowest)
    steps = full["num_train_timesteps"]
    return SchedulerSettings(
        _table(full),
        PREDICTIONS[full["prediction_type"]](),
        LearnedRange(num_steps=steps) if learned else FixedVariance(),
        sampler,
        spacing,
        thresholding,
    )


def read_noising(config: Mapping[str, Any], what: str) -> DiscreteSchedule:
    """The table by which IFSuperResolutionPipeline noises low-resolution images.

    Raises:
        InputError: a scheduler other than DDPMScheduler, or a table that is unknown here.
    """
    if config.get("_class_name") != "DDPMScheduler":
        raise InputError(f"{what} is of {config.get('_class_name')!r}; it must be of DDPMScheduler")
    full, wrong = _filled(config, DDPM_DEFAULTS)
    if wrong:
        raise InputError(f"{what} cannot be followed: {'; '.join(wrong)}")
    _tell_unread(config, full, what)
    return _table(full)


def scheduler_config(diffusion: Diffusion, sampling: Sampling) -> tuple[dict[str, Any], list[str]]:
    """The scheduler_config.json of a stage's settings, and those that it cannot express, by name and value."""
    wrong: list[str] = []
    table = _written_table(diffusion.schedule, "schedule", wrong)
    kinds = [name for name, kind in PREDICTIONS.items() if isinstance(diffusion.parametrization, kind)]
    if not kinds:
        wrong.append(f"parametrization {_name(diffusion.parametrization)} ({_names(PREDICTIONS.values())})")
    if diffusion.variance is None:
        wrong.append("variance null (LearnedRange or FixedVariance: the pipelines take 6 channels)")
    if sampling.guidance_interval is not None:
        wrong.append(f"guidance_interval {list(sampling.guidance_interval)} (null)")
    if sampling.guidance_rescale:
        wrong.append(f"guidance_rescale {sampling.guidance_rescale} (0)")
    shared = {**table, "prediction_type": kinds[0] if kinds else None}
    write = _ddpm if isinstance(sampling.sampler, DDPM) else _dpm
    return write(shared, diffusion, sampling, wrong), wrong


def _ddpm(shared: dict[str, Any], diffusion: Diffusion, sampling: Sampling, wrong: list[str]) -> dict[str, Any]:
    sampler, spacing, rule = sampling.sampler, sampling.spacing, sampling.thresholding
    assert isinstance(sampler, DDPM)
    types = {ours: theirs for theirs, ours in VARIANCES.items()}
    if not isinstance(spacing, LeadingTimes | TrailingTimes):
        wrong.append(f"spacing {_name(spacing)} (LeadingTimes or TrailingTimes)")
    return {
        "_class_name": "DDPMScheduler",
        **DDPM_DEFAULTS,
        **shared,
        **_thresholding(rule, (DynamicThresholding, StaticThresholding, NoThresholding), wrong),
        "clip_sample": not isinstance(rule, NoThresholding),
        "variance_type": types[sampler.variance],
        "timestep_spacing": "trailing" if isinstance(spacing, TrailingTimes) else "leading",
        "steps_offset": getattr(spacing, "offset", 0),
    }


def _dpm(shared: dict[str, Any], diffusion: Diffusion, sampling: Sampling, wrong: list[str]) -> dict[str, Any]:
    sampler, spacing = sampling.sampler, sampling.spacing
    algorithms = [name for name, kind in SOLVERS.items() if isinstance(sampler, kind)]
    if not algorithms:
        wrong.append(f"sampler {_name(sampler)} (DDPM, {_names(SOLVERS.values())})")
    below = getattr(sampler, "lower_order_below", 0)
    if below not in (0, LOWER_ORDER_BELOW):
        wrong.append(f"sampler's lower_order_below {below} (0 or {LOWER_ORDER_BELOW})")
    if not isinstance(spacing, LinspaceTimes):
        wrong.append(f"spacing {_name(spacing)} (LinspaceTimes)")
    lowest = getattr(spacing, "lambda_min", None)
    return {
        "_class_name": "DPMSolverMultistepScheduler",
        **DPM_DEFAULTS,
        **shared,
        **_thresholding(sampling.thresholding, (DynamicThresholding, NoThresholding), wrong),
        "algorithm_type": algorithms[0] if algorithms else None,
        "lower_order_final": below > 0,
        "lambda_min_clipped": -math.inf if lowest is None else lowest,
        "variance_type": "learned_range" if isinstance(diffusion.variance, LearnedRange) else None,
    }


def noising_config(schedule: Schedule) -> tuple[dict[str, Any], list[str]]:
    """The config of the image_noising_scheduler for a stage's augmentation, and what it cannot express."""
    wrong: list[str] = []
    table = _written_table(schedule, "augmentation.schedule", wrong)
    return {"_class_name": "DDPMScheduler", **DDPM_DEFAULTS, **table}, wrong


def same_scheduler(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two configs make the same scheduler: fields left out have its defaults."""
    kind = one.get("_class_name")
    defaults = DPM_DEFAULTS if kind == "DPMSolverMultistepScheduler" else DDPM_DEFAULTS
    return kind == other.get("_class_name") and _read(one, defaults) == _read(other, defaults)


def _read(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The config, its defaults filled in, without those fields that others of its fields make unread."""
    full, _ = _filled(config, defaults)
    unread = ["dynamic_thresholding_ratio", "sample_max_value"]
    if full["thresholding"]:
        unread = ["clip_sample", "clip_sample_range"]
    elif not full.get("clip_sample"):
        unread.append("clip_sample_range")
    unread += ["beta_schedule", "beta_start", "beta_end"] if full["trained_betas"] is not None else []
    return {key: value for key, value in full.items() if key not in unread}


def _table(full: Mapping[str, Any]) -> DiscreteSchedule:
    if full["trained_betas"] is not None:
        return DiscreteSchedule(list(full["trained_betas"]), full["num_train_timesteps"])
    return DiscreteSchedule(full["beta_schedule"], full["num_train_timesteps"], full["beta_start"], full["beta_end"])


def _written_table(schedule: Schedule, name: str, wrong: list[str]) -> dict[str, Any]:
    if not isinstance(schedule, DiscreteSchedule):
        wrong.append(f"{name} {_name(schedule)} (DiscreteSchedule)")
        return {}
    listed = not isinstance(schedule.betas, str)
    return {
        "num_train_timesteps": schedule.num_steps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": "linear" if listed else schedule.betas,
        "trained_betas": list(schedule.betas) if listed else None,
    }


def _thresholding(rule: Thresholding, known: tuple[type, ...], wrong: list[str]) -> dict[str, Any]:
    if not isinstance(rule, known):
        wrong.append(f"thresholding {_name(rule)} ({_names(known)})")
    if not isinstance(rule, DynamicThresholding):
        return THRESHOLDING
    return {
        "thresholding": True,
        "dynamic_thresholding_ratio": rule.percentile,
        "sample_max_value": rule.max_value,
    }


def _filled(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The config with its defaults filled in, and what is wrong in it whatever it is read for."""
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    wrong: list[str] = []
    for key, value in REQUIRED_EARLIER.items():
        _check({key: value, **given}, key, (value,), wrong)
    full = {**defaults, **{key: value for key, value in given.items() if key in defaults}}
    for key, value in REQUIRED.items():
        if key in full:
            _check(full, key, (value,), wrong)
    if full["trained_betas"] is None:
        _check(full, "beta_schedule", ("linear", "squaredcos_cap_v2"), wrong)
    return full, wrong


def _tell_unread(config: Mapping[str, Any], full: Mapping[str, Any], what: str) -> None:
    """Warn of the fields that the scheduler does not read, if there are any."""
    unread = [key for key in config if not key.startswith("_") and key not in full and key not in REQUIRED_EARLIER]
    if unread:
        warnings.warn(f"{what}: {config['_class_name']} does not read {', '.join(unread)}; passed over", stacklevel=3)


def _check(full: Mapping[str, Any], key: str, known: tuple[Any, ...], wrong: list[str]) -> None:
    if full[key] not in known:
        wrong.append(f"{key} {full[key]!r} ({' or '.join(map(repr, known))})")


def _name(part: object) -> str:
    return type(part).__name__


def _names(kinds: Any) -> str:
    names = [kind.__name__ for kind in kinds]
    return ", ".join(names[:-1]) + f" or {names[-1]}" if len(names) > 1 else names[0]
