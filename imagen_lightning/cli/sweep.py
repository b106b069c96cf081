"""`imagen-lightning sweep FILE`: a W&B sweep file's trials on this machine, with no network and no account."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from imagen_lightning.cli.arguments import Parser
from imagen_lightning.errors import InputError, counted

if TYPE_CHECKING:
    import optuna

    from imagen_lightning.sweeps.folder import SweepFolder

SHOWN = 10  # trials that --dry-run shows of a search without end
MAX_SHOWN = 1000
FEW = 5  # logs that are named
MAX_TRIALS = 100_000


def parser() -> Parser:
    made = Parser(
        "sweep",
        description="Runs the trials of a W&B sweep file, each as a process of its own, and keeps them in an Optuna "
        "study. Stopped and started again, it resumes where it was. Exit code: 0 where a trial finished or was pruned, "
        "1 where all trials failed, 2 for bad input.",
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
    for name, highest in (("trials", MAX_TRIALS), ("workers", 1000)):
        if getattr(arguments, name) is not None and not 1 <= getattr(arguments, name) <= highest:
            raise InputError(f"--{name} {getattr(arguments, name)} must be in 1..{highest}")
    if arguments.study == "":
        raise InputError("--study is empty; give a database URL or a file")
    if not 0 <= arguments.seed < 2**32:
        raise InputError(f"--seed {arguments.seed} must be in 0..{2**32 - 1}")

    from imagen_lightning.cli.configs import find_config
    from imagen_lightning.cli.sweep_check import check
    from imagen_lightning.sweeps import search
    from imagen_lightning.sweeps.file import read_sweep
    from imagen_lightning.sweeps.folder import SweepFolder, opened
    from imagen_lightning.sweeps.runner import Runner, preview, trial_command

    sweep = read_sweep(find_config(arguments.file))
    if arguments.out is None and (Path(sweep.name).parts != (sweep.name,) or sweep.name == ".."):
        raise InputError(f"{sweep.path}: name {sweep.name!r} is not a folder's; give --out")
    out = arguments.out or Path("runs") / sweep.name
    most = arguments.trials or sweep.run_cap
    if sweep.method == "grid":
        most = min(search.grid_size(sweep), most or search.grid_size(sweep))
    if arguments.dry_run:
        folder = SweepFolder(out, "", "")
        if most is None or most > MAX_SHOWN:
            what = f"{sweep.method} has no end of its own" if most is None else f"of {most:,} trials"
            most = SHOWN
            print(f"{what}: the first {most} trials", file=sys.stderr)
        check(sweep)
        for number, params in enumerate(preview(sweep, arguments.sampler, arguments.seed, most)):
            print(shlex.join(trial_command(sweep, params, folder, number)))
        return 0
    if most is None:
        raise InputError(f"{sweep.method} has no end of its own; give --trials N, or run_cap in the file")
    if most > MAX_TRIALS:
        raise InputError(f"{sweep.path} asks for {most:,} trials; give --trials N, at most {MAX_TRIALS:,}")
    is_known = check(sweep)  # before anything is made
    with opened(out, sweep, arguments.study) as folder:
        may_replace = folder.is_alone and not folder.has_trials
        study = search.open_study(sweep, folder.study, arguments.sampler, arguments.seed, may_replace=may_replace)
        runner = Runner(sweep, study, folder, slots(arguments.workers), most, say=_say, metric_is_known=is_known)
        counts = runner.run()
        is_well = _tell(sweep.metric.name, study, folder)
    if counts.signal is not None:
        return 128 + counts.signal
    return 0 if is_well else 1


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


def _tell(metric: str, study: optuna.Study, folder: SweepFolder) -> bool:
    """Print how many trials there are, the best, the failed ones' logs and what to do next.

    Returns whether a trial finished or was pruned, or none failed.
    """
    import optuna

    from imagen_lightning.sweeps.search import SURPLUS

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
    if failed := kinds[optuna.trial.TrialState.FAIL]:
        logs = ", ".join(str(folder.log(trial.number)) for trial in failed[:FEW] if folder.log(trial.number).exists())
        more = ", ..." if len(failed) > FEW else ""
        print(f"{counted(len(failed), 'trial')} failed" + (f"; logs: {logs}{more}" if logs else ""))
    print(f"imagen-lightning report {shlex.quote(str(folder.path))} makes its page")
    return not failed or bool(complete or kinds[optuna.trial.TrialState.PRUNED])
