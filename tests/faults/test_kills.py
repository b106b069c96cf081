"""Runs killed with SIGKILL at random moments, each compared at its end with the uninterrupted run, to the bit."""

import random
import time
from collections import Counter
from pathlib import Path

import pytest
from kill_harness import PHASES, STEPS, Run, config, fork_server, write_shards

from imagen_lightning.callbacks.history import read_history
from imagen_lightning.cli.verify_resume import HISTORY, compare_runs, table

SEED = 20260101


def kill_runs(folder: Path, plan: list[tuple[str, int, int]], num_kills: int) -> list[Run]:
    """Runs of a plan of (data, accumulated batches, workers), each killed and compared; prints what was hit.

    Returns:
        The runs.
    """
    shards = folder / "shards"
    write_shards(shards)
    whole: dict[tuple[str, int], Run] = {}
    killed = []
    with fork_server() as context:

        def make(name: str, data: str, accumulate: int, workers: int) -> Run:
            return Run(context, folder / name, config(data, shards, accumulate), workers)

        for data, accumulate in sorted({item[:2] for item in plan}):
            whole[data, accumulate] = make(f"{data}-{accumulate}", data, accumulate, 0)
            whole[data, accumulate].finish()
            assert len(read_history(whole[data, accumulate].run / HISTORY)) == STEPS
        for number, (data, accumulate, workers) in enumerate(plan):
            start = time.monotonic()
            run = make(f"killed-{number}", data, accumulate, workers)
            run.kill_often(num_kills, random.Random(SEED + number))
            found = compare_runs(whole[data, accumulate].run, run.run)
            hits = Counter(hit for _, hit in run.kills)
            print(
                f"run {number}: {data}, {accumulate} accumulated, {workers} workers, seed {SEED + number}: "
                f"{len(run.kills)} kills ({', '.join(f'{hits[phase]} in {phase}' for phase in PHASES)}; "
                f"{run.num_partials} left a partial file), {time.monotonic() - start:.0f} s",
                flush=True,
            )
            assert all(item.largest == 0.0 for item in found), table(found)
            assert skipped(run) == skipped(whole[data, accumulate])
            assert not list(run.run.rglob("*.partial"))
            killed.append(run)
    return killed


def skipped(run: Run) -> list[str]:
    path = run.run / "skipped.jsonl"
    return sorted(path.read_text().splitlines()) if path.exists() else []


def test_killed_runs_end_as_the_uninterrupted_ones(tmp_path):
    plan = [("shards", 1, 0), ("shapes", 2, 2), ("shards", 1, 4)]
    runs = kill_runs(tmp_path, plan, num_kills=5)
    assert sum(len(run.kills) for run in runs) >= 11


@pytest.mark.faults
def test_two_hundred_kills(tmp_path):
    start = time.monotonic()
    plan = [
        (data, accumulate, workers) for workers in (0, 2, 4) for data in ("shards", "shapes") for accumulate in (1, 2)
    ]
    runs = kill_runs(tmp_path, plan, num_kills=20)
    hits = Counter(hit for run in runs for _, hit in run.kills)
    print(
        f"{len(runs)} runs, {hits.total()} kills: {dict(hits)}, {sum(run.num_partials for run in runs)} with a partial "
        f"file; all equal to the bit; {time.monotonic() - start:.0f} s"
    )
    assert len(runs) >= 12
    assert hits.total() >= 200
    assert all(hits[phase] >= 5 for phase in PHASES)
