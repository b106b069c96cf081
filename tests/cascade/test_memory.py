"""A stage of 3 GiB is loaded and saved in its own size and little more (`benchmarks/cascade_memory.py`)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GIB = 2**30


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_a_large_stage_needs_its_own_size_and_its_largest_tensor(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "cascade_memory.py"), "--folder", str(tmp_path)]
    subprocess.run([*command, "--out", str(tmp_path / "figures.json")], check=True)
    saved, loaded, half = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert saved["weights_bytes"] == loaded["weights_bytes"] == 2 * half["weights_bytes"] > 2 * GIB
    assert saved["sum"] == loaded["sum"] == pytest.approx(half["sum"], rel=1e-2, abs=50)
    for row in (loaded, half):
        assert row["peak_bytes"] > 0.98 * row["weights_bytes"]  # what is measured are the weights
    for row in (saved, loaded, half):
        assert row["beyond_bytes"] < row["largest_tensor_bytes"] * 1.5 + 0.1 * GIB < GIB
