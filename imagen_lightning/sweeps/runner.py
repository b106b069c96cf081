"""Runs a sweep's trials: starts their processes, watches their metric, and tells the study what became of them.

Everything that has to outlive the sweep is in the study and in the trials' folders: a sweep that was killed is begun
again with the same command, takes over the trials that were its own, and loses none that had finished.
"""

from __future__ import annotations

import difflib
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from imagen_lightning.sweeps import command, metric, process, search
from imagen_lightning.sweeps.file import SweepFile
from imagen_lightning.sweeps.folder import SweepFolder
from imagen_lightning.sweeps.process import TrialProcess

if TYPE_CHECKING:
    from optuna.study import Study

# Of a trial in the study. SECONDS is the sum over its starts; STARTED is when the last one began, until that is added.
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
        metric_is_known: whether the metric's name was checked against what trials log.
        say: told of each trial's beginning and end.
        pause: seconds between two looks at the running trials.
        patience: seconds that a process gets to end when asked.
    """

    sweep: SweepFile
    study: Study
    folder: SweepFolder
    slots: list[Slot]
    most: int
    metric_is_known: bool = False
    say: Say = print
    pause: float = 0.5
    patience: float = PATIENCE
    counts: Counts = field(default_factory=Counts)
    _active: list[Active] = field(default_factory=list)
    _signals: list[int] = field(default_factory=list)
    _told: bool = False
    _warned: bool = False  # of a metric that may be misspelt
    _stopping: bool = False  # no trial begins any more: a finished one lacks the metric
    _waiting: list[FrozenTrial] = field(default_factory=list)  # of an earlier process of this folder

    def run(self) -> Counts:
        """Runs until all trials are there, or a signal comes.

        The first SIGINT or SIGTERM asks the running trials to finish their step; another one kills them. Both leave
        them to be resumed.
        """
        with self._watching_signals():
            self._take_over()
            while True:
                while not self._is_ending and len(self._active) < len(self.slots) and self._begin_next():
                    pass
                if not self._active:
                    break
                time.sleep(self.pause)
                self._obey()
                for active in list(self._active):
                    self._look(active)
        self.counts.signal = self._signals[0] if self._signals else None
        return self.counts

    @property
    def _is_ending(self) -> bool:
        return bool(self._signals) or self._stopping

    # ---- beginning

    def _take_over(self) -> None:
        """Finds the trials that an earlier process of this folder left running."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            # In a study of this folder alone, one that nobody owns was begun in the moment of a kill.
            if trial.user_attrs.get(OWNER, self.folder.owner if self.folder.is_alone else None) != self.folder.owner:
                continue
            process.end_orphan(self.folder.process(trial.number), self.patience)
            own = Trial(self.study, trial._trial_id)
            if (started := trial.user_attrs.get(STARTED)) is not None:
                seen = process.last_seen(self.folder.process(trial.number))
                wrote = metric.last_written(self.folder.trial(trial.number))  # after the sweep's last look at it
                self._add_seconds(own, max(seen, wrote) - started)
            if trial.user_attrs.get(STOPPED):
                self._end(own, TrialState.PRUNED, "stopped early")
            else:
                self._waiting.append(trial)

    def _again(self, frozen: FrozenTrial) -> Trial:
        """Return a trial to resume, as `ask` would have made it whole."""
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
        """Resume a trial or begin one; return False where there is none."""
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
        trial.set_user_attr(STARTED, process.last_seen(self.folder.process(number)))
        self.say(f"trial {number} {'resumes' if attempts > 1 else 'begins'}: {_words(self.sweep, trial.params)}")
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
            process.see(self.folder.process(active.trial.number))
            if active.asked is not None and time.monotonic() - active.asked > self.patience:
                active.running.kill()
            elif stamp is not None and changed and not found and not self.metric_is_known:
                self._warn_of_metric(folder)
            return
        self._active.remove(active)
        self._add_seconds(active.trial, time.monotonic() - active.started)
        self._ended(active, code, found)

    def _add_seconds(self, trial: Trial, seconds: float) -> None:
        """Add what a start took, also one whose sweep was killed, and note that it is counted."""
        trial.set_user_attr(SECONDS, round(float(trial.user_attrs.get(SECONDS, 0.0)) + max(seconds, 0.0), 2))
        trial.set_user_attr(STARTED, None)

    def _warn_of_metric(self, folder: Path) -> None:
        """Say once that the first rows lack the metric, where its name may be misspelt."""
        known = metric.known_metrics(folder)
        near = difflib.get_close_matches(self.sweep.metric.name, known, n=3, cutoff=0.85)
        if near and not self._warned:
            self._warned = True
            self.say(
                f"metric {self.sweep.metric.name!r} has not been logged yet; did you mean {' or '.join(near)}? "
                "(Ctrl-C ends the sweep)"
            )

    def _ended(self, active: Active, code: int, found: list[tuple[int, float]]) -> None:
        trial, name = active.trial, self.sweep.metric.name
        if active.pruned:
            self._end(trial, TrialState.PRUNED, f"stopped early at {name} {found[-1][1]:.6g}")
        elif code == 0 and found:
            trial.set_user_attr("step", found[-1][0])
            self._end(trial, TrialState.COMPLETE, f"{name} {found[-1][1]:.6g}", found[-1][1])
        elif code == 0:
            known = metric.known_metrics(self.folder.trial(trial.number))
            near = difflib.get_close_matches(name, known, n=3)
            what = (
                f"did you mean {' or '.join(near)}? it logged {', '.join(known[:20])}"
                if near
                else (f"it logged {', '.join(known[:20])}" if known else "it logged nothing")
            )
            self._end(trial, TrialState.FAIL, f"metric {name!r} is missing: {what}")
            if not self._stopping and not self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
                self._stopping = True
                self.say("no further trial begins, since none would have a value: correct metric.name")
        elif self._signals:
            self.say(f"trial {trial.number} is left to be resumed")
        elif code < 0 or code == 128 + signal.SIGTERM:
            self._killed(active, -code if code < 0 else code - 128)
        else:
            log = active.running.log
            self._end(trial, TrialState.FAIL, f"exit code {code}; the end of {log}:\n{process.log_end(log)}")

    def _killed(self, active: Active, number: int) -> None:
        """Resume a trial that something else ended, a few times: it may be what is killed for memory."""
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
        became = {TrialState.FAIL: "failed", TrialState.PRUNED: "was pruned"}.get(state, "finished")
        self.say(f"trial {trial.number} {became}: {words}")

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
            self.say("ending: running trials finish their step and can be resumed; once more kills them")
        for active in self._active:
            if len(self._signals) > 1:
                active.running.kill()
            elif active.asked is None:
                active.asked = time.monotonic()
                active.running.terminate()


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
    """Return the first trials' parameters, by a study in memory; of bayes what is tried before anything is known."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=search.sampler(sweep, bayes, seed))
    return [study.ask(search.space(sweep)).params for _ in range(most)]
