"""The peak is that of the work, not of what went before it."""

import mmap
from pathlib import Path

import pytest
import torch

from imagen_lightning.evaluation.memory import PeakMemory

SIZE = 200 << 20
CPU = torch.device("cpu")


def take_and_return():
    with mmap.mmap(-1, SIZE) as memory:
        for start in range(0, SIZE, mmap.PAGESIZE):
            memory[start] = 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_a_peak_is_of_the_time_since_its_beginning():
    take_and_return()
    peak = PeakMemory(CPU)
    quiet = peak.read()
    take_and_return()
    assert 0.9 * SIZE < peak.read() - quiet < 1.5 * SIZE


def test_where_nobody_knows_there_is_no_number(tmp_path):
    assert PeakMemory(CPU, tmp_path / "proc").read() is None
