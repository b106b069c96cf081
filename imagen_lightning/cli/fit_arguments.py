"""The command line of `fit` before it is parsed: which configuration it is, and which run folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

# isort: split
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from imagen_lightning.callbacks import wandb_agent_run
from imagen_lightning.cli.configs import find_config, read_config
from imagen_lightning.errors import InputError

CONFIG = "config.yaml"
_SEEDS = ("seed_everything", "model.init_args.seed", "data.init_args.seed")


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


def prepare(verb: str, arguments: Sequence[str]) -> list[str]:
    """Settles configuration and run folder before anything is parsed: a run is resumed with its own config.yaml.

    Raises:
        InputError: a configuration does not exist; the folder holds a run and `--resume` is not given, or holds
            something else.
    """
    names, rest = _take(arguments, "--config", "-c")
    configs = [find_config(name) for name in names]
    contents = [read_config(path) for path in configs]
    seeds, rest = _take(rest, "--seed")
    rest += [f"--{key}={seeds[-1]}" for key in _SEEDS] if seeds else []
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
            _refuse_used(Path(runs[-1]), resume)
            own = Path(runs[-1], CONFIG)
            if resume and own.exists():
                configs = [own]
    return [item for path in configs for item in ("--config", str(path))] + rest


def _refuse_used(run: Path, resume: bool) -> None:
    if not is_first():
        return  # the first process has looked, and may have begun to write
    if (run / CONFIG).exists():
        if not resume:
            raise InputError(f"{run} holds a run already; add --resume to go on with it, or choose another --run")
        tell(f"going on with {run}, configured by {run / CONFIG}")
    elif run.is_file() or (run.exists() and any(path.name != f"{CONFIG}.partial" for path in run.iterdir())):
        raise InputError(f"{run} is not empty and holds no run; choose another --run")


def is_first() -> bool:
    """Whether this is the first of the run's processes, or the only one."""
    return getattr(rank_zero_only, "rank", 0) == 0


def tell(text: str) -> None:
    if is_first():
        print(text, file=sys.stderr, flush=True)
