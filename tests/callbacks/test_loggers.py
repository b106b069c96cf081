"""metrics.csv through stops and resumes; run.json; the W&B run of a folder."""

import csv
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

from imagen_lightning.callbacks import RunCSVLogger, loggers, read_run_info, update_run_info, wandb_logger
from imagen_lightning.callbacks.loggers import _has_wandb_key
from imagen_lightning.types import InputError


def rows_of(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_one_row_a_step_and_columns_as_they_came(tmp_path):
    logger = RunCSVLogger(str(tmp_path))
    logger.log_metrics({"train/loss": 0.1, "epoch": 0}, step=0)
    logger.log_metrics({"train/loss": torch.tensor(0.5)}, step=3)
    logger.log_metrics({"val/loss": 1 / 3, "train/loss": 0.25}, step=3)
    logger.log_metrics({"a": math.nan}, step=10)
    logger.log_hyperparams({"ignored": 1})
    logger.finalize("success")
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "step,train/loss,epoch,val/loss,a",
        "0,0.1,0,,",
        f"3,0.25,,{1 / 3!r},",
        "10,,,,nan",
    ]


def test_a_run_that_logs_nothing_has_a_file_that_a_resumed_one_reads(tmp_path):
    RunCSVLogger(str(tmp_path)).finalize("success")
    assert (tmp_path / "metrics.csv").read_text() == "step\n"
    RunCSVLogger(str(tmp_path)).log_metrics({"loss": 1.0}, step=3)
    assert rows_of(tmp_path) == [{"step": "3", "loss": "1.0"}]


def test_a_resumed_run_loses_and_doubles_nothing(tmp_path):
    def log(logger, steps, **more):
        for step in steps:
            logger.log_metrics({"loss": step / 10, **more}, step)

    first = RunCSVLogger(str(tmp_path))
    log(first, range(10), old=1.0)
    first.save()
    first.flush()  # as time goes by; the process is then killed
    resumed = RunCSVLogger(str(tmp_path))
    resumed.rewind(6)
    log(resumed, range(6, 12), new=2.0)
    resumed.finalize("success")
    rows = rows_of(tmp_path)
    assert [int(row["step"]) for row in rows] == list(range(12))
    assert [row["old"] for row in rows] == ["1.0"] * 6 + [""] * 6
    assert [row["new"] for row in rows] == [""] * 6 + ["2.0"] * 6
    assert list(rows[0]) == ["step", "loss", "old", "new"]


def test_without_rewind_an_earlier_step_joins_its_row(tmp_path):
    RunCSVLogger(str(tmp_path)).log_metrics({"loss": 1.0}, 5)
    evaluation = RunCSVLogger(str(tmp_path))
    evaluation.log_metrics({"fid": 9.0}, 5)
    evaluation.log_metrics({"fid": 10.0}, 0)
    evaluation.finalize("success")
    assert rows_of(tmp_path) == [
        {"step": "0", "loss": "", "fid": "10.0"},
        {"step": "5", "loss": "1.0", "fid": "9.0"},
    ]


def test_the_file_is_whole_at_any_moment(tmp_path, monkeypatch):
    logger = RunCSVLogger(str(tmp_path))
    logger.log_metrics({"loss": 1.0}, 0)
    before = rows_of(tmp_path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    logger._next_flush = 0.0
    with pytest.raises(OSError, match="disk full"):
        logger.log_metrics({"loss": 2.0}, 1)
    assert rows_of(tmp_path) == before == [{"step": "0", "loss": "1.0"}]


def test_a_foreign_file_is_refused(tmp_path):
    (tmp_path / "metrics.csv").write_text("name,value\na,1\n")
    with pytest.raises(InputError, match=r"metrics\.csv is no table of steps"):
        RunCSVLogger(str(tmp_path))


def test_run_info(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_run_info(tmp_path / "run") == {}
    monkeypatch.setattr("sys.argv", ["/somewhere/imagen-lightning", "fit", "--seed", "two words"])
    info = update_run_info(tmp_path / "run", seed=3)
    assert info["command"] == "imagen-lightning fit --seed 'two words'"
    assert info["versions"]["torch"] == torch.__version__
    assert set(info["versions"]) == {"imagen-lightning", "torch", "lightning", "python"}
    assert info["git"] is None
    assert read_run_info(tmp_path / "run") == info
    monkeypatch.setattr("sys.argv", ["other"])
    assert update_run_info(tmp_path / "run", seed=4, loss=math.inf) == {**info, "seed": 4, "loss": math.inf}
    assert json.loads((tmp_path / "run/run.json").read_text())["loss"] == "inf"
    (tmp_path / "run/run.json").write_text('{"created": ')
    with pytest.raises(InputError, match=r"run\.json is not readable"):
        read_run_info(tmp_path / "run")


def test_run_info_names_the_revision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("one")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    revision = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert update_run_info(tmp_path / "a")["git"] == revision
    (tmp_path / "file").write_text("two")
    assert update_run_info(tmp_path / "b")["git"] == f"{revision}-dirty"


def test_wandb_is_online_only_with_a_key(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    asked = []
    monkeypatch.setattr(loggers, "_begin_online", lambda logger: None)
    monkeypatch.setattr(loggers, "WandbLogger", lambda **settings: asked.append(settings) or Mock())

    def mode():
        wandb_logger(tmp_path, "p", {})
        assert "log_model" not in asked[-1]
        return asked[-1]["mode"]

    assert mode() == "offline"
    (tmp_path / "netrc").write_text("machine elsewhere.org login user password x\n")
    assert not _has_wandb_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert mode() == "online"
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert mode() == "offline"
    assert {settings["id"] for settings in asked} == {read_run_info(tmp_path)["wandb_id"]}


def test_a_stopped_run_goes_on_as_the_same_offline_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    ids = []
    for part in range(2):
        logger = wandb_logger(run, "project", {"stage": {"image_size": 8 + part}}, job_type="fit")
        logger.log_metrics({"loss": 1.0}, step=part)
        logger.log_image("samples", [Image.new("RGB", (8, 8))], step=part)
        ids.append(logger.experiment.id)
        assert logger.experiment.config["stage"] == {"image_size": 8 + part}
        assert logger.experiment.name == "run"
        logger.experiment.finish()
    assert ids == [read_run_info(run)["wandb_id"]] * 2
    files = list(run.glob(f"wandb/offline-run-*-{ids[0]}/run-{ids[0]}.wandb"))
    assert files
    assert max(file.stat().st_size for file in files) > 100  # W&B may write the last one a moment later
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_was_measured_of_the_checkpoints_weights_stays(tmp_path):
    first = RunCSVLogger(str(tmp_path))
    for step in range(1, 6):
        first.log_metrics({"train/loss": 1.0, "sr_256/fid": float(step), "base/text_gain": 0.5}, step)
    first.flush()
    resumed = RunCSVLogger(str(tmp_path))
    resumed.rewind(3)
    resumed.flush()
    assert [(row["step"], row["train/loss"], row["sr_256/fid"]) for row in rows_of(tmp_path)] == [
        ("1", "1.0", "1.0"),
        ("2", "1.0", "2.0"),
        ("3", "", "3.0"),
    ]
    resumed.log_metrics({"train/loss": 2.0}, 3)
    resumed.flush()
    assert rows_of(tmp_path)[-1] == {"step": "3", "train/loss": "2.0", "sr_256/fid": "3.0", "base/text_gain": "0.5"}


@pytest.fixture
def black_hole():
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


class Refusing(BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_error(404)

    def log_message(self, *_):
        pass


def test_any_answer_shows_that_a_server_is_there(black_hole):
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert loggers._unreachable(f"http://127.0.0.1:{server.server_address[1]}") is None
        server.shutdown()
    assert "refused" in loggers._unreachable("http://127.0.0.1:9")
    start = time.monotonic()
    assert "does not answer within 3 seconds" in loggers._unreachable(black_hole)
    assert time.monotonic() - start < 8


LOG = """
import sys, time
from imagen_lightning.callbacks import wandb_logger
import wandb
wandb.setup()
start = time.monotonic()
logger = wandb_logger(sys.argv[1], "project", {})
seconds = time.monotonic() - start
logger.experiment.log({"a": 1})
print("\\nfound", seconds, wandb.run.settings.mode)
"""


@pytest.mark.parametrize(
    "how", ["silent", *(pytest.param(how, marks=pytest.mark.slow) for how in ("refused", "not found"))]
)
def test_without_a_network_a_run_with_a_key_logs_offline_within_seconds(tmp_path, black_hole, how):
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:  # answers, but begins no run
        threading.Thread(target=server.serve_forever, daemon=True).start()
        there = f"http://127.0.0.1:{server.server_address[1]}"
        address = {"refused": "http://127.0.0.1:9", "silent": black_hole, "not found": there}[how]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
        environment |= {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": address, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", LOG, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        server.shutdown()
    (line,) = [line for line in done.stderr.splitlines() if "logging offline" in line]
    assert f"`wandb sync {tmp_path}/wandb/offline-run-*` uploads the run later" in line
    (found,) = [line for line in done.stdout.splitlines() if line.startswith("found ")]
    _, seconds, mode = found.split()
    assert mode == "offline"
    assert float(seconds) < 10
    assert list(tmp_path.glob("wandb/offline-run-*"))
