"""The command line of `fit` before it is parsed: which configuration it is, and which run folder."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

# isort: split
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from imagen_lightning.callbacks import find_last, wandb_agent_run
from imagen_lightning.cli.configs import find_config, read_config
from imagen_lightning.errors import InputError
from imagen_lightning.io.atomic import is_temporary
from imagen_lightning.io.locks import locked

CONFIG, LOCK = "config.yaml", ".lock"
SEEDS = ("seed_everything", "model.init_args.seed", "data.init_args.seed")


def _take(arguments: Sequence[str], *names: str) -> tuple[list[str], list[str]]:
    """The values given to an option (`--name value` or `--name=value`), and the other arguments."""
    values, rest, items = [], [], iter(arguments)
    for item in items:
        name, has_value, value = item.partition("=")
        if name not in names:
            rest.append(item)
        elif has_value:
            values.append(value)
        else:
            following = next(items, None)
            if following is None:
                raise InputError(f"{item} needs a value")
            values.append(following)
    return values, rest


def prepare(verb: str, arguments: Sequence[str], stack: ExitStack) -> list[str]:
    """Settle configuration and run folder before anything is parsed: a run is resumed with its own config.yaml.

    Args:
        verb: `fit` or another subcommand of the trainer.
        arguments: what follows it.
        stack: holds the lock of fit's run folder until it is closed.

    Raises:
        InputError: a configuration does not exist; the folder holds a run and `--resume` is not given, holds no run
            to resume or something else, or is in use by another process.
    """
    names, rest = _take(arguments, "--config", "-c")
    configs = [find_config(name) for name in names]
    contents = [read_config(path) for path in configs]
    for content in contents:
        check_values(content)
    seeds, rest = _take(rest, "--seed")
    rest += [f"--{key}={seeds[-1]}" for key in SEEDS] if seeds else []
    writes = not any(item.split("=")[0].endswith(("-h", "help", "--print_config")) for item in rest)
    if verb == "fit" and writes:
        resume = "--resume" in rest
        runs, rest = _take([item for item in rest if item != "--resume"], "--run")
        if not runs:
            runs = [str(content["run"]) for content in contents if content.get("run")]
            agent = wandb_agent_run()
            if runs and agent is not None:
                runs, resume = [str(Path(runs[-1], *agent))], True
        if runs:
            rest += ["--run", runs[-1]]
            run = Path(runs[-1])
            if resume and not configs and not (run / CONFIG).exists():
                raise InputError(f"{run} holds no run to resume; check --run, or give --config to begin one there")
            if is_first():  # the others find that it holds the lock, and may find what it has begun to write
                stack.enter_context(_claimed(run))
                _refuse_used(run, resume)
            if resume and (run / CONFIG).exists():
                configs = [run / CONFIG]
    return [item for path in configs for item in ("--config", str(path))] + rest


@contextmanager
def _claimed(run: Path) -> Iterator[None]:
    """Hold a run folder's lock; of a folder that holds no run in the end nothing stays that was made here."""
    if run.is_file():
        raise InputError(f"{run} is a file and holds no run; choose another --run")
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    try:
        run.mkdir(parents=True, exist_ok=True)
        with locked(run / LOCK, f"run folder {run}", advice="wait for its end, or choose another --run"):
            try:
                yield
            finally:
                if not (run / CONFIG).exists():
                    (run / LOCK).unlink(missing_ok=True)
    except OSError as error:
        if isinstance(error.filename, str | Path) and Path(error.filename) in (run / LOCK, *made, *run.parents):
            raise InputError(
                f"run folder {str(run)!r} cannot be used: {error.strerror}; choose another --run"
            ) from error
        raise
    finally:
        with suppress(OSError):  # what holds something stays
            for folder in made:
                folder.rmdir()


def _refuse_used(run: Path, resume: bool) -> None:
    if (run / CONFIG).exists():
        if not resume:
            begun = "" if find_last(run) else " (without a checkpoint, so that it begins anew)"
            raise InputError(f"{run} holds a run already; add --resume to continue it{begun}, or choose another --run")
        tell(f"resuming {run}, configured by {run / CONFIG}")
    elif any(not (is_temporary(path) or path.name.startswith(LOCK)) for path in run.iterdir()):
        raise InputError(f"{run} is not empty and holds no run; choose another --run")


def check_values(value: Any, key: str = "") -> None:
    """Raises InputError for what no configuration can mean, whatever its key."""
    if isinstance(value, dict):
        path = value.get("class_path", "")
        if not isinstance(path, str):
            raise InputError(f"{key}.class_path {path!r} is not the name of a class")
        if path.split(".")[0] in ("callbacks", "experiments"):
            raise InputError(f"class_path {path!r} would be a second class; write imagen_lightning.{path}")
        for name, item in value.items():
            check_values(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            check_values(item, key)
    elif isinstance(value, float) and math.isnan(value):
        raise InputError(f"{key} is not a number (nan); give one")
    elif isinstance(value, int | float) and 2**63 <= abs(value) < math.inf:
        raise InputError(f"{key} {value} is too large; give a number below 2**63")


def is_first() -> bool:
    """Whether this is the first of the run's processes, or the only one."""
    return getattr(rank_zero_only, "rank", 0) == 0


def tell(text: str) -> None:
    if is_first():
        print(text, file=sys.stderr, flush=True)
