"""`imagen-lightning sweep FILE`: a W&B sweep file's trials on this machine, with no network and no account."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from imagen_lightning.cli.arguments import Parser
from imagen_lightning.errors import InputError, counted

SHOWN = 10  # trials that --dry-run shows of a search without end


def parser() -> Parser:
    made = Parser(
        "sweep",
        description="Runs the trials of a W&B sweep file, each as a process of its own, and keeps them in an Optuna "
        "study. Stopped and started again, it goes on where it was.",
    )
    made.add_argument("file", metavar="FILE", help="a W&B sweep file; one that ships, e.g. sweeps/stage_base.yaml")
    made.add_argument(
        "--trials",
        type=int,
        metavar="N",
        help="trials of the study in all, those of earlier starts included (default: the whole grid, or the file's "
        "run_cap)",
    )
    made.add_argument(
        "--workers", type=int, metavar="K", help="trials at a time, sharing CPU or GPUs (default: one a GPU, else 1)"
    )
    made.add_argument(
        "--study",
        metavar="URL|FILE",
        help="Optuna's database URL, or a journal file on a shared disk (default sqlite:///OUT/study.db)",
    )
    made.add_argument("--out", type=Path, metavar="DIR", help="default runs/NAME; each machine needs its own")
    made.add_argument(
        "--sampler", choices=["tpe", "gp"], default="tpe", help="what `method: bayes` means (default %(default)s)"
    )
    made.add_argument("--seed", type=int, default=0, help="of random and bayes (default 0)")
    made.add_argument("--dry-run", action="store_true", help="print the trials' commands and end")
    return made


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    for name in ("trials", "workers"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise InputError(f"--{name} {getattr(arguments, name)} must be at least 1")
    if arguments.seed < 0:
        raise InputError(f"--seed {arguments.seed} must not be below 0")

    from imagen_lightning.cli.configs import find_config
    from imagen_lightning.cli.sweep_check import check
    from imagen_lightning.sweeps import search
    from imagen_lightning.sweeps.file import read_sweep
    from imagen_lightning.sweeps.folder import SweepFolder, opened
    from imagen_lightning.sweeps.runner import Runner, preview, trial_command

    sweep = read_sweep(find_config(arguments.file))
    out = arguments.out or Path("runs") / sweep.name
    most = arguments.trials or sweep.run_cap
    if sweep.method == "grid":
        most = min(search.grid_size(sweep), most or search.grid_size(sweep))
    if arguments.dry_run:
        folder = SweepFolder(out, "", "")
        if most is None:
            most = SHOWN
            print(f"{sweep.method} has no end of its own: the first {most} trials", file=sys.stderr)
        check(sweep)
        for number, params in enumerate(preview(sweep, arguments.sampler, arguments.seed, most)):
            print(shlex.join(trial_command(sweep, params, folder, number)))
        return 0
    if most is None:
        raise InputError(f"{sweep.method} has no end of its own; give --trials N, or run_cap in the file")
    with opened(out, sweep, arguments.study) as folder:
        study = search.open_study(sweep, folder.study, arguments.sampler, arguments.seed)
        check(sweep)
        runner = Runner(sweep, study, folder, slots(arguments.workers), most, say=_say)
        counts = runner.run()
        _tell(sweep.metric.name, study, folder.path)
    return 0 if counts.signal is None else 128 + counts.signal


def slots(workers: int | None) -> list:
    """One a worker: GPUs are dealt out in turn, the CPU's threads are shared evenly."""
    from imagen_lightning.sweeps.runner import Slot

    devices = _devices()
    count = workers or max(len(devices), 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // count) if count > 1 else None
    return [Slot(threads, devices[place % len(devices)] if devices else None) for place in range(count)]


def _devices() -> list[str]:
    """The GPUs as CUDA_VISIBLE_DEVICES names them, without importing torch."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [word.strip() for word in given.split(",") if word.strip() and word.strip() != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [str(number) for number in range(sum(line.startswith("GPU ") for line in listed.stdout.splitlines()))]


def _say(text: str) -> None:
    print(text, flush=True)


def _tell(metric: str, study: object, out: Path) -> None:
    """How many trials there are, the best, and what to do next."""
    import optuna

    from imagen_lightning.sweeps.search import SURPLUS

    assert isinstance(study, optuna.Study)
    trials = [trial for trial in study.get_trials(deepcopy=False) if not trial.user_attrs.get(SURPLUS)]
    kinds = {state: [trial for trial in trials if trial.state == state] for state in optuna.trial.TrialState}
    complete = kinds[optuna.trial.TrialState.COMPLETE]
    words = [
        f"{len(found)} {name}"
        for name, found in (
            ("finished", complete),
            ("pruned", kinds[optuna.trial.TrialState.PRUNED]),
            ("failed", kinds[optuna.trial.TrialState.FAIL]),
            ("not finished", kinds[optuna.trial.TrialState.RUNNING]),
        )
        if found
    ]
    print(f"{counted(len(trials), 'trial')}: {', '.join(words) or 'none'}")
    if complete:
        best = study.best_trial
        print(f"best {metric} {best.value:.6g}: trial {best.number}, {best.user_attrs.get('folder', '')}")
    print(f"imagen-lightning report {shlex.quote(str(out))} makes its page")
