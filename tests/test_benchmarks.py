"""The benchmarks run, at sizes too small to measure anything."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from given_data import given

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL = ["--dim", "32", "--size", "16", "--batch", "2", "--rounds", "1"]

pytestmark = pytest.mark.slow


def run(script, *arguments):
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_train_step(tmp_path):
    out = tmp_path / "figures.json"
    table = run("train_step.py", *SMALL, "--peers", "ours,diffusers", "--out", str(out))
    rows = json.loads(out.read_text())["rows"]
    assert [(row["peer"], row["precision"]) for row in rows] == [
        (peer, precision) for precision in ("fp32", "bf16") for peer in ("ours", "diffusers")
    ]
    assert all(f"| {row['peer']} | {row['precision']} | {row['parameters_M']} |" in table for row in rows)
    # The two networks are one: they have the same weights but for diffusers' channels of variance, and the same FLOPs.
    assert rows[0]["parameters_M"] == pytest.approx(rows[1]["parameters_M"], abs=0.1)
    assert rows[0]["gflops_per_image"] == pytest.approx(rows[1]["gflops_per_image"], rel=0.02)


def test_sample(tmp_path):
    out = tmp_path / "figures.json"
    run("sample.py", *SMALL, "--steps", "2", "--out", str(out))
    rows = json.loads(out.read_text())["rows"]
    assert [row["program"] for row in rows] == ["ours", "diffusers", "ours", "diffusers"]
    assert all(row["seconds_per_image"] > 0 for row in rows)


def test_gpu_on_a_cpu(tmp_path):
    out = tmp_path / "figures.json"
    run("gpu.py", "--device", "cpu", "--small", "--out", str(out))
    cases = json.loads(out.read_text())["cases"]
    assert {case["task"] for case in cases} >= {"base_100M", "sr_256", "sample_base_100M"}
    assert not [case for case in cases if "failed" in case]


def test_text_states(tmp_path):
    given()
    out = tmp_path / "figures.json"
    run("text_states.py", "--steps", "2", "--features", "64", "--layers", "1", "--rounds", "1", "--out", str(out))
    figures = json.loads(out.read_text())
    assert all(row["int8"] < 0.51 * row["float16"] < row["padded_float32"] for row in figures["sizes"])
    assert figures["relative_rms_error"]["float16"] < 0.0005 < figures["relative_rms_error"]["int8"] < 0.02
    assert all(rate > 0 for rate in figures["steps_per_second"].values())
    losses = figures["val_loss"]
    assert losses["int8"] == pytest.approx(losses["live"], rel=1e-3)
