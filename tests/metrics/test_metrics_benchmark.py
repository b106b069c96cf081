"""The benchmark of metrics runs, at sizes too small to measure anything."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "metrics.py"


@pytest.mark.slow
def test_the_benchmark_of_metrics(tmp_path):
    out = tmp_path / "figures.json"
    small = ["--batch", "2", "--size", "32", "--num-features", "64", "--rounds", "1", "--out", str(out)]
    done = subprocess.run([sys.executable, str(BENCHMARK), *small], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {(row["task"], row["program"]): row for row in json.loads(out.read_text())["rows"]}
    for task in ("distance, full", "distance, few", "features"):
        assert all(rows[task, program]["seconds"] > 0 for program in ("ours", "torchmetrics", "torch-fidelity"))
    assert abs(float(rows["distance, full", "ours"]["relative"])) < 1e-6
