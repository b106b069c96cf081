"""Whether a sweep's commands mean what they say, before the first trial: misspelt names and values are refused.

The configuration that `fit` would print (`--print_config`) is made for the file's values in turn, in a process of its
own, so that the sweep holds neither torch nor Lightning in memory while its trials run.
"""

from __future__ import annotations

import difflib
import json
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from imagen_lightning.errors import InputError
from imagen_lightning.sweeps.command import arguments_of, environment, expand, own_command
from imagen_lightning.sweeps.file import SweepFile

EVALUATION_METRICS = (
    *("caption accuracy", "seconds_per_image", "precision", "recall", "PSNR", "SSIM", "LPIPS", "low-res PSNR"),
    *("colour shift", *(f"caption accuracy, {part}" for part in ("background", "number", "color", "shape", "size"))),
    "caption accuracy, relation",
)
_MOST = 24  # values of one parameter that are tried
_PROGRAM = "import sys; from imagen_lightning.cli.sweep_check import answer; answer(sys.stdin, sys.stdout)"


def check(sweep: SweepFile) -> bool:
    """Check a sweep's commands; return whether what their trials log is known, and the metric is part of it.

    Raises:
        InputError: there is no such program; a parameter of `fit` or `evaluate`, or one of its values, would be refused
            by them, or they log no such metric.
    """
    commands = [expand(sweep, arguments_of(sweep, values)) for values in examples(sweep)]
    program = commands[0][0]
    if shutil.which(program, path=environment(Path(), "", None, None)["PATH"]) is None:
        raise InputError(f"{sweep.path}: there is no program {program!r}; the sweep's command begins with it")
    found = [command for words in commands if (command := own_command(words)) is not None]
    if not found:
        return False
    try:
        for name, words in found:
            if name == "evaluate":
                _check_evaluation(words, sweep.metric.name)
            elif name != "fit":
                raise InputError(f"a sweep runs imagen-lightning fit or evaluate, not {name[:80]!r}")
        return _check_fits([words for name, words in found if name == "fit"], sweep.metric.name)
    except InputError as error:
        raise InputError(f"{sweep.path}: {error}") from None


def _check_evaluation(words: Sequence[str], metric: str) -> None:
    from imagen_lightning.cli.evaluate import axes_of, parser

    arguments = parser().parse_args([*words, "--out", "out"])
    axes_of(arguments)
    if arguments.features or (arguments.inception or "download") != "download":
        return  # such networks name their distances themselves
    features = ("FD-random", "KD-random") if arguments.inception is None else ("FID", "KID", "Inception score")
    clip = () if arguments.clip is None else ("CLIP score", "CLIP-FID", "CLIP-KID")
    _require(metric, {*EVALUATION_METRICS, *features, *clip})


def _require(metric: str, names: Collection[str]) -> None:
    if metric not in names:
        near = difflib.get_close_matches(metric, names, n=3)
        listed = sorted(name for name in names if name.count("/") < 2)  # without the losses by level
        raise InputError(
            f"no trial would log the metric {metric!r}; "
            + (f"did you mean {' or '.join(near)}?" if near else f"use {', '.join(listed)}")
        )


def _check_fits(fits: Sequence[Sequence[str]], metric: str) -> bool:
    """Check in a process of its own; return whether the metric's name could be checked."""
    if not fits:
        return True
    asked = json.dumps({"fits": fits, "metric": metric})
    done = subprocess.run([sys.executable, "-c", _PROGRAM], input=asked, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the configuration could not be checked:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    if found["problem"] is not None:
        raise InputError(found["problem"])
    return bool(found["is_known"])


def examples(sweep: SweepFile) -> Iterator[dict[str, Any]]:
    """Yield values by parameter: the first of each, then every other one of each in turn."""
    first = {parameter.name: parameter.distribution.examples()[0] for parameter in sweep.parameters}
    yield first
    for parameter in sweep.parameters:
        for value in list(parameter.distribution.examples())[1:_MOST]:
            yield first | {parameter.name: value}


def answer(source: Any, target: Any) -> None:
    """Read commands of `fit` and a metric as JSON; write the first problem, or null, and whether metrics are known."""
    stdout, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    asked = json.load(source)
    problem, is_known = None, True
    try:
        for words in asked["fits"]:
            names = logged_names(configuration(words))
            is_known = is_known and names is not None
            if names is not None:
                _require(asked["metric"], names)
    except InputError as error:
        problem = str(error)
    finally:
        sys.stdout = stdout
    print(json.dumps({"problem": problem, "is_known": is_known}), file=target)


def logged_names(config: Mapping[str, Any]) -> set[str] | None:
    """Return the names that a training of this configuration may log; None where a class does not say.

    Callbacks say it by `metric_names(stage)`; those of this package that lack it log nothing.

    Args:
        config: from `configuration`.

    Raises:
        InputError: a callback's arguments are refused, or nothing is logged at all.
    """
    from lightning.pytorch import Callback

    from imagen_lightning import callbacks, stages
    from imagen_lightning.callbacks.values import stage_name_of
    from imagen_lightning.cli import fit

    if config["trainer"]["logger"] is False:
        raise InputError("trainer.logger false writes no metrics.csv, where a sweep reads its metric; leave it out")
    if config["trainer"]["logger"] not in (None, True):
        return None
    sections: dict[str, Any] = {
        **{"ema": callbacks.EMA, "checkpoint": callbacks.Checkpoint, "finite_loss": callbacks.FiniteLoss},
        **{"noise_level_loss": callbacks.NoiseLevelLoss, "throughput": callbacks.Throughput},
        "skipped_samples": callbacks.SkippedSamples,
    }
    own = {f"imagen_lightning.stages.{cls.__name__}" for cls in (stages.BaseStage, stages.SuperResolutionStage)}
    if config["model"]["class_path"] not in own:
        return None
    arguments = config["model"]["init_args"]
    stage = stage_name_of(arguments.get("low_res_size"), arguments["image_size"])
    parser = fit.Parser()
    parser.add_argument("--callbacks", type=list[Callback])
    given = config["trainer"]["callbacks"] or []
    given = given if isinstance(given, list) else [given]
    try:
        made = parser.instantiate_classes(parser.parse_object({"callbacks": given}))
    except ValueError as error:  # jsonargparse's, around what a class said
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__cause__
        raise cause or error from None
    names = {"train/loss", "val/loss", "epoch"}
    for callback in [*made.callbacks, *(cls(**config.get(section, {})) for section, cls in sections.items())]:
        if hasattr(callback, "metric_names"):
            names |= callback.metric_names(stage)
        elif not type(callback).__module__.startswith("imagen_lightning."):
            return None
    return names


def configuration(words: Sequence[str]) -> dict[str, Any]:
    """Return what `imagen-lightning fit WORDS --print_config` prints, without making anything.

    Raises:
        InputError: what `fit` would refuse.
    """
    import yaml

    from imagen_lightning.cli import fit
    from imagen_lightning.cli.fit_arguments import prepare

    class Parsed(fit.StageCLI):
        def instantiate_classes(self) -> None:
            pass

    with ExitStack() as stack:
        given = [word for word in prepare("fit", [*words, "--print_config"], stack) if word != "--print_config"]
    arguments, sys.argv = sys.argv, sys.argv[:1]
    try:
        made = Parsed(
            run=False,
            parser_class=fit.Parser,
            save_config_callback=None,
            trainer_defaults=fit.TRAINER_DEFAULTS,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            args=given,
        )
    finally:
        sys.argv = arguments
    return yaml.safe_load(made.dump())
