"""Runs a sweep's trials: starts their processes, watches their metric, and tells the study what became of them.

Everything that has to outlive the sweep is in the study and in the trials' folders: a sweep that was killed is begun
again with the same command, takes over the trials that were its own, and loses none that had finished.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from imagen_lightning.errors import InputError
from imagen_lightning.sweeps import command, metric, process, search
from imagen_lightning.sweeps.file import SweepFile
from imagen_lightning.sweeps.folder import SweepFolder
from imagen_lightning.sweeps.process import TrialProcess

if TYPE_CHECKING:
    from optuna.study import Study

OWNER, FOLDER, COMMAND, PROBLEM, STOPPED, ATTEMPTS, SECONDS, STARTED = (
    *("owner", "folder", "command", "problem", "stopped", "attempts", "seconds", "started"),
)
MOST_ATTEMPTS = 3  # of a trial whose process a signal ended
PATIENCE = 600.0  # seconds for a process to finish its step and save
Say = Callable[[str], None]


@dataclass(frozen=True)
class Slot:
    """One worker's share of the machine: CPU threads, and a GPU as CUDA_VISIBLE_DEVICES names it."""

    threads: int | None = None
    device: str | None = None


@dataclass
class Active:
    """A trial that runs."""

    trial: Trial
    slot: Slot
    running: TrialProcess
    started: float
    num_reported: int = 0
    stamp: object = None  # of the file that the metric was read from last
    pruned: bool = False
    asked: float | None = None  # to end, when


@dataclass
class Counts:
    """What a run of the sweep did, and whether a signal ended it."""

    complete: int = 0
    pruned: int = 0
    failed: int = 0
    signal: int | None = None


@dataclass
class Runner:
    """Runs trials until there are as many as wanted.

    Args:
        sweep: the file.
        study: of it.
        folder: this machine's.
        slots: one a worker.
        most: trials of the study, on all machines together; for a grid at most its combinations.
        say: told of each trial's beginning and end.
        pause: seconds between two looks at the running trials.
        patience: seconds that a process gets to end when asked.
    """

    sweep: SweepFile
    study: Study
    folder: SweepFolder
    slots: list[Slot]
    most: int
    say: Say = print
    pause: float = 0.5
    patience: float = PATIENCE
    counts: Counts = field(default_factory=Counts)
    _active: list[Active] = field(default_factory=list)
    _signals: list[int] = field(default_factory=list)
    _told: bool = False
    _waiting: list[FrozenTrial] = field(default_factory=list)  # of an earlier process of this folder

    def run(self) -> Counts:
        """Runs until all trials are there, or a signal comes.

        The first SIGINT or SIGTERM asks the running trials to finish their step; another one kills them. Both leave
        them to be gone on with.
        """
        with self._watching_signals():
            self._take_over()
            while True:
                while not self._signals and len(self._active) < len(self.slots) and self._begin_next():
                    pass
                if not self._active:
                    break
                time.sleep(self.pause)
                self._obey()
                for active in list(self._active):
                    self._look(active)
        self.counts.signal = self._signals[0] if self._signals else None
        return self.counts

    # ---- beginning

    def _take_over(self) -> None:
        """Finds the trials that an earlier process of this folder left running."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            # In a study of this folder alone, one that nobody owns was begun in the moment of a kill.
            if trial.user_attrs.get(OWNER, self.folder.owner if self.folder.is_alone else None) != self.folder.owner:
                continue
            process.end_orphan(self.folder.process(trial.number), self.patience)
            self._add_lost_seconds(trial)
            if trial.user_attrs.get(STOPPED):
                self._end(Trial(self.study, trial._trial_id), TrialState.PRUNED, "stopped early")
            else:
                self._waiting.append(trial)

    def _add_lost_seconds(self, trial: FrozenTrial) -> None:
        """Adds the time from a start whose end a killed sweep did not see to its process's last sign of life."""
        started = trial.user_attrs.get(STARTED)
        if started is not None:
            known = Trial(self.study, trial._trial_id)
            last = metric.last_written(self.folder.log(trial.number), self.folder.trial(trial.number))
            _add_seconds(known, max(0.0, (last or started) - started))

    def _again(self, frozen: FrozenTrial) -> Trial:
        """A trial to go on with, as `ask` would have made it whole."""
        trial = Trial(self.study, frozen._trial_id)
        for name, distribution in search.space(self.sweep).items():
            trial._suggest(name, distribution)
        return self._owned(trial)

    def _owned(self, trial: Trial) -> Trial:
        if trial.user_attrs.get(OWNER) is None:
            trial.set_user_attr(FOLDER, str(self.folder.trial(trial.number)))
            trial.set_user_attr(OWNER, self.folder.owner)
        return trial

    def _begin_next(self) -> bool:
        """Goes on with a trial or begins one; False where there is none."""
        if self._waiting:
            frozen = self._waiting.pop(0)
            self._begin(self._again(frozen), len(frozen.intermediate_values))
            return True
        if len(self.study.get_trials(deepcopy=False)) >= self.most:
            return False
        trial = self.study.ask(search.space(self.sweep))
        if trial.number >= self.most:  # another machine took the last one in this moment
            trial.set_user_attr(search.SURPLUS, True)
            self.study.tell(trial, state=TrialState.FAIL)
            return False
        self._begin(self._owned(trial), 0)
        return True

    def _begin(self, trial: Trial, num_reported: int) -> None:
        number = trial.number
        slot = next(slot for slot in self.slots if all(slot is not active.slot for active in self._active))
        words = trial_command(self.sweep, trial.params, self.folder, number)
        attempts = int(trial.user_attrs.get(ATTEMPTS, 0)) + 1
        if attempts == 1:
            trial.set_user_attr(COMMAND, words)
            trial.set_user_attr("values", search.values_of(self.sweep, trial.params))
        trial.set_user_attr(ATTEMPTS, attempts)
        trial.set_user_attr(STARTED, time.time())
        made = command.environment(self.folder.trial(number), self.sweep.name, slot.threads, slot.device)
        self.folder.trial(number).parent.mkdir(parents=True, exist_ok=True)
        try:
            running = process.start(words, made, self.folder.log(number), self.folder.process(number))
        except OSError as error:
            self._end(trial, TrialState.FAIL, f"cannot be started: {error}")
            return
        self.say(f"trial {number} {'goes on' if attempts > 1 else 'begins'}: {_words(self.sweep, trial.params)}")
        self._active.append(Active(trial, slot, running, time.monotonic(), num_reported))

    # ---- watching

    def _look(self, active: Active) -> None:
        """Reports what was logged, stops what the pruner gives up, and records what has ended."""
        code = active.running.code()
        folder = self.folder.trial(active.trial.number)
        stamp = metric.stamp(folder)
        changed = code is not None or stamp != active.stamp
        active.stamp = stamp
        found = metric.history(folder, self.sweep.metric.name) if changed else []
        for count, (_, value) in enumerate(found[active.num_reported :], active.num_reported + 1):
            active.trial.report(value, count)
            active.num_reported = count
            if code is None and not active.pruned and not self._signals and active.trial.should_prune():
                active.pruned = True
                active.trial.set_user_attr(STOPPED, True)
                active.asked = time.monotonic()
                active.running.terminate()
        if code is None:
            if active.asked is not None and time.monotonic() - active.asked > self.patience:
                active.running.kill()
            return
        self._active.remove(active)
        _add_seconds(active.trial, time.monotonic() - active.started)
        self._ended(active, code, found)

    def _ended(self, active: Active, code: int, found: list[tuple[int, float]]) -> None:
        trial, name = active.trial, self.sweep.metric.name
        if active.pruned:
            self._end(trial, TrialState.PRUNED, f"stopped early at {name} {found[-1][1]:.6g}")
        elif code == 0 and found:
            trial.set_user_attr("step", found[-1][0])
            self._end(trial, TrialState.COMPLETE, f"{name} {found[-1][1]:.6g}", found[-1][1])
        elif code == 0:
            known = metric.known_metrics(self.folder.trial(trial.number))
            what = f"it logged {', '.join(known[:20])}" if known else "it logged nothing"
            self._end(trial, TrialState.FAIL, f"metric {name!r} is missing: {what}")
        elif self._signals:
            self.say(f"trial {trial.number} is left to be gone on with")
        elif code < 0 or code == 128 + signal.SIGTERM:
            self._killed(active, -code if code < 0 else code - 128)
        else:
            log = active.running.log
            self._end(trial, TrialState.FAIL, f"exit code {code}; the end of {log}:\n{process.log_end(log)}")

    def _killed(self, active: Active, number: int) -> None:
        """Goes on with a trial that something else ended, a few times: it may be what is killed for memory."""
        trial, name = active.trial, signal.Signals(number).name
        if int(trial.user_attrs.get(ATTEMPTS, 1)) < MOST_ATTEMPTS:
            self.say(f"trial {trial.number} was ended by {name}")
            self._waiting.append(self.study._storage.get_trial(trial._trial_id))
            return
        log = active.running.log
        words = f"ended by {name} {MOST_ATTEMPTS} times; the end of {log}:\n{process.log_end(log)}"
        self._end(trial, TrialState.FAIL, words)

    def _end(self, trial: Trial, state: TrialState, words: str, value: float | None = None) -> None:
        if state == TrialState.FAIL:
            trial.set_user_attr(PROBLEM, words)
            self.counts.failed += 1
        elif state == TrialState.PRUNED:
            self.counts.pruned += 1
        else:
            self.counts.complete += 1
        self.study.tell(trial, value, state=state)
        verb = {TrialState.FAIL: "failed", TrialState.PRUNED: "was pruned"}.get(state, "finished")
        self.say(f"trial {trial.number} {verb}: {words}")

    # ---- signals

    @contextmanager
    def _watching_signals(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, lambda got, _: self._signals.append(got)) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _obey(self) -> None:
        if not self._signals:
            return
        if not self._told:
            self._told = True
            self.say("ending: running trials finish their step and can be gone on with; once more kills them")
        for active in self._active:
            if len(self._signals) > 1:
                active.running.kill()
            elif active.asked is None:
                active.asked = time.monotonic()
                active.running.terminate()


def _add_seconds(trial: Trial, seconds: float) -> None:
    """Adds the time of one start of a trial to that of its earlier starts."""
    trial.set_user_attr(SECONDS, round(float(trial.user_attrs.get(SECONDS, 0.0)) + seconds, 2))
    trial.set_user_attr(STARTED, None)


def trial_command(sweep: SweepFile, params: dict[str, Any], folder: SweepFolder, number: int) -> list[str]:
    """The command of the trial of that number.

    Args:
        sweep: the file.
        params: as the study has them.
        folder: this machine's.
        number: of the trial.
    """
    arguments = command.arguments_of(sweep, search.values_of(sweep, params))
    return command.in_folder(command.expand(sweep, arguments), folder.trial(number), folder.samples)


def _words(sweep: SweepFile, params: dict[str, Any]) -> str:
    values = search.values_of(sweep, params)
    return ", ".join(f"{parameter.name}={values[parameter.name]}" for parameter in search.searched(sweep)) or "as it is"


def preview(sweep: SweepFile, bayes: str, seed: int, most: int) -> list[dict[str, Any]]:
    """The parameters of the first trials, by a study in memory; of bayes only what is drawn before anything is known.

    Raises:
        InputError: no trials.
    """
    if most < 1:
        raise InputError(f"--trials {most} must be at least 1")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=search.sampler(sweep, bayes, seed))
    return [study.ask(search.space(sweep)).params for _ in range(most)]
