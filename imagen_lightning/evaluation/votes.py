"""Blind votes between two cascades: which is on which side, what was voted, and what that says.

DrawBench's protocol (Saharia et al. 2022, arXiv 2205.11487, section 4.3): a person sees two sets of images of one
prompt and says for each of two questions which set is the better, or that there is no difference.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imagen_lightning.errors import InputError
from imagen_lightning.files import read_text
from imagen_lightning.metrics.confidence import wilson

QUESTIONS = {
    "fidelity": "Which set of images is of higher quality?",
    "alignment": "Which set of images better represents the text caption?",
}
SIDES = ("left", "right", "tie")

ALIKE = 0.1  # an interval within 40% to 60% shows that neither is preferred


@dataclass(frozen=True)
class Vote:
    """One answer: of a prompt's number and question, for cascade "a", "b" or "tie"."""

    prompt: int
    question: str
    choice: str


def order(num_prompts: int, seed: int) -> list[int]:
    """The prompts in the random order in which they are shown."""
    return [int(number) for number in np.random.default_rng([seed, 0]).permutation(num_prompts)]


def left_is_a(num_prompts: int, seed: int) -> list[bool]:
    """Which prompts show cascade A on the left."""
    return [bool(value) for value in np.random.default_rng([seed, 1]).integers(2, size=num_prompts)]


class Ballot:
    """Votes in a file of one JSON object a line, written as they fall; a later answer replaces an earlier one.

    Args:
        path: the file; a last line that was cut off by a crash is left out.
        num_prompts: prompts of the comparison.
        seed: of sides and order.

    Raises:
        InputError: a line that is no vote of this comparison.
    """

    def __init__(self, path: Path, num_prompts: int, seed: int) -> None:
        self.path = path
        self.num_prompts = num_prompts
        self.order = order(num_prompts, seed)
        self._left_is_a = left_is_a(num_prompts, seed)
        self.votes: dict[tuple[int, str], Vote] = {}
        if path.exists():
            self._read()

    def shown(self, prompt: int, side: str) -> str:
        """The cascade, "a" or "b", that a prompt shows on a side."""
        return "a" if (side == "left") == self._left_is_a[prompt] else "b"

    def cast(self, prompt: int, question: str, side: str) -> None:
        """Adds an answer; it is on disk when this returns.

        Raises:
            InputError: an unknown prompt, question or side.
            OSError: it cannot be written; nothing is left of it.
        """
        if not 0 <= prompt < self.num_prompts or question not in QUESTIONS or side not in SIDES:
            raise InputError(f"prompt {prompt!r}, question {question!r}, side {side!r} is no vote of this ballot")
        vote = Vote(prompt, question, "tie" if side == "tie" else self.shown(prompt, side))
        line = json.dumps(vars(vote)).encode() + b"\n"
        with self.path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                os.fsync(file.fileno())
            except OSError:  # a disk that is full: the next vote must not join half of this one
                os.truncate(self.path, end)
                raise
        self.votes[prompt, question] = vote

    def is_done(self, prompt: int) -> bool:
        return all((prompt, question) in self.votes for question in QUESTIONS)

    def _read(self) -> None:
        lines = read_text(self.path, "votes").split("\n")
        if lines[-1]:  # cut off: the next vote begins a new line
            with self.path.open("r+", encoding="utf-8") as file:
                file.truncate(len("\n".join([*lines[:-1], ""]).encode()))
        for number, line in enumerate(lines[:-1], 1):
            try:
                vote = Vote(**json.loads(line))
                valid = type(vote.prompt) is int and 0 <= vote.prompt < self.num_prompts
                valid = valid and vote.question in QUESTIONS and vote.choice in ("a", "b", "tie")
            except (ValueError, TypeError, RecursionError):
                valid = False
            if not valid:
                raise InputError(
                    f"{self.path}, line {number}, is not a vote of this comparison; fix or remove the file"
                )
            self.votes[vote.prompt, vote.question] = vote


@dataclass(frozen=True)
class Preference:
    """The answers to one question.

    Attributes:
        question: "fidelity" or "alignment".
        a, b, ties: numbers of answers.
        share_a: A's share in [0, 1], ties counted half.
        low, high: its 95% interval by Wilson's formula.
    """

    question: str
    a: int
    b: int
    ties: int
    share_a: float
    low: float
    high: float

    def sentence(self) -> str:
        total = self.a + self.b + self.ties
        text = f"{self.question}: A {self.a}, B {self.b}, no difference {self.ties} of {total}"
        if self.low > 0.5 or self.high < 0.5:
            verdict = "A is preferred" if self.low > 0.5 else "B is preferred"
        else:
            alike = max(0.5 - self.low, self.high - 0.5) <= ALIKE
            verdict = "no preference" if alike else "which is preferred cannot be told from these answers"
        return f"{text}; A's share {self.share_a:.0%} ({self.low:.0%} to {self.high:.0%}): {verdict}"


def preferences(votes: Iterable[Vote], prompts: Sequence[int] | None = None) -> list[Preference]:
    """The outcome by question, of all prompts or of some; a question without answers is left out."""
    kept = None if prompts is None else set(prompts)
    found = []
    for question in QUESTIONS:
        choices = [v.choice for v in votes if v.question == question and (kept is None or v.prompt in kept)]
        if choices:
            found.append(_preference(question, choices))
    return found


def _preference(question: str, choices: Sequence[str]) -> Preference:
    counts: Mapping[str, int] = {name: choices.count(name) for name in ("a", "b", "tie")}
    share = (counts["a"] + 0.5 * counts["tie"]) / len(choices)
    low, high = wilson(share * len(choices), len(choices))  # ties vary less: the interval is wide rather than narrow
    return Preference(question, counts["a"], counts["b"], counts["tie"], share, low, high)
