"""Loggers of a run folder: metrics.csv always, Weights & Biases offline unless a key is present."""

from __future__ import annotations

import csv
import io
import logging
import netrc
import os
import secrets
import ssl
import sys
import time
from argparse import Namespace
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from PIL.Image import Image

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

from lightning.pytorch.loggers import Logger, WandbLogger  # isort: skip
from lightning.pytorch.utilities.rank_zero import rank_zero_only  # isort: skip

from imagen_lightning.callbacks.run_folder import read_run_info, update_run_info
from imagen_lightning.catalog import is_of_weights
from imagen_lightning.io.atomic import is_temporary, write_text
from imagen_lightning.types import InputError

log = logging.getLogger(__name__)

METRICS = "metrics.csv"
PROBE_SECONDS, INIT_SECONDS = 3.0, 4.0  # that W&B's server may take to answer at all, and to begin a run
_FLUSH_SHARE = 0.02  # of the time may go into writing the file


class RunCSVLogger(Logger):
    """Keeps RUN/metrics.csv: one row a step, one column a metric, in the order in which they first appeared.

    The file is always whole: each flush writes it anew beside its place and renames it. Rows of an earlier part of the
    run are kept; `rewind` drops those that a resumed run will measure again. Hyperparameters are ignored: config.yaml
    has them.

    Args:
        run_dir: the run folder.

    Raises:
        InputError: metrics.csv exists and is no table of steps.
    """

    def __init__(self, run_dir: str) -> None:
        super().__init__()
        self.run_dir = str(run_dir)
        self._path = Path(run_dir) / METRICS
        self._columns: list[str] = []
        self._rows: list[dict[str, str]] = []
        self._steps: list[int] = []
        self._dirty = not self._path.exists()  # a run too short to log anything has a file too
        self._next_flush = 0.0
        if not self._dirty:
            self._read()
        self._remove_partial()

    @property
    def name(self) -> str:
        return Path(self.run_dir).name

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return self.run_dir

    @property
    def log_dir(self) -> str:
        return self.run_dir

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        pass

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds numbers to the row of `step`; a number logged twice at a step keeps its last value."""
        step = int(step or 0)
        place = bisect_left(self._steps, step)
        if place == len(self._steps) or self._steps[place] != step:
            self._steps.insert(place, step)
            self._rows.insert(place, {})
        for key, value in metrics.items():
            self._rows[place][key] = repr(value.item() if hasattr(value, "item") else value)
            if key not in self._columns:
                self._columns.append(key)
        self._dirty = True
        if time.monotonic() >= self._next_flush:
            self.flush()

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drops what a run that goes on from its checkpoint at `step` logs again.

        That is the rows of `step` and beyond; but what was measured of the checkpoint's weights, `base/…` and
        `sr_256/…` at `step`, stays.
        """
        place = bisect_left(self._steps, step)
        self._dirty |= place < len(self._steps)
        rows = self._rows[place : place + 1] if self._steps[place : place + 1] == [step] else []
        measured = [{key: value for key, value in row.items() if is_of_weights(key)} for row in rows]
        kept = [row for row in measured if row]
        self._steps[place:], self._rows[place:] = [step] * len(kept), kept
        used = {key for row in self._rows for key in row}
        self._columns = [key for key in self._columns if key in used]

    def save(self) -> None:
        """Lightning calls this after each of its own rows; the file is written when that costs little of the time."""
        if time.monotonic() >= self._next_flush:
            self.flush()

    @rank_zero_only
    def _remove_partial(self) -> None:
        """Takes away what a process that was killed while it wrote left."""
        for path in self._path.parent.glob(f".{METRICS}.*"):
            if is_temporary(path):
                path.unlink(missing_ok=True)

    def finalize(self, status: str) -> None:
        try:
            self.flush()
        except OSError as error:
            if status == "success":
                raise
            log.warning("%s was not written to its end: %s", self._path, error.strerror)  # the run's error counts

    @rank_zero_only
    def flush(self) -> None:
        """Writes the file where it differs from what was logged."""
        if not self._dirty:
            return
        start = time.monotonic()
        text = io.StringIO()
        writer = csv.DictWriter(text, ["step", *self._columns], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({"step": step, **row} for step, row in zip(self._steps, self._rows))
        write_text(self._path, text.getvalue())
        self._dirty = False
        end = time.monotonic()
        self._next_flush = end + (end - start) / _FLUSH_SHARE

    def _read(self) -> None:
        try:
            with self._path.open(encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file)
                self._columns = list(reader.fieldnames or ["step"])
                self._columns.remove("step")
                rows = {int(row.pop("step")): row for row in reader}
        except (ValueError, TypeError, csv.Error):
            raise InputError(f"{self._path} is no table of steps; move it out of the run folder") from None
        self._steps = sorted(rows)
        self._rows = [{key: value for key, value in rows[step].items() if value} for step in self._steps]


def wandb_logger(
    run_dir: str | Path,
    project: str,
    config: dict[str, Any],
    name: str | None = None,
    job_type: str | None = None,
    group: str | None = None,
) -> WandbLogger:
    """A Weights & Biases logger of a run folder; run.json keeps its id, so that a stopped run goes on as the same run.

    It is offline unless a key is at hand (WANDB_API_KEY, or `wandb login` was run), and WANDB_MODE decides where it is
    set. Where W&B does not answer within seconds it is offline too, and a line on stderr says so. Its files lie in
    RUN/wandb; `wandb sync RUN/wandb/offline-*` uploads them later. Models are never uploaded.

    Args:
        run_dir: the run folder.
        project: the project's name.
        config: the resolved configuration, plain data.
        name: of the run; by default its folder's name.
        job_type: the stage's name, "base" or "sr_256", unless $WANDB_JOB_TYPE says another.
        group: what the run belongs to, a cascade or a sweep; by default $WANDB_RUN_GROUP, else `cascade_name`.
    """
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    agent = wandb_agent_run()
    identity = read_run_info(folder).get("wandb_id") or (agent[1] if agent else secrets.token_hex(4))
    if getattr(rank_zero_only, "rank", 0) == 0:
        update_run_info(folder, wandb_id=identity)
    # Given to W&B in any case: it reads the variable once a process.
    mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
    logger = WandbLogger(
        save_dir=str(folder),
        id=identity,
        project=project,
        name=name or folder.resolve().name,
        config=config,
        allow_val_change=True,
        job_type=os.environ.get("WANDB_JOB_TYPE") or job_type,
        group=group or os.environ.get("WANDB_RUN_GROUP") or cascade_name(folder),
        mode=mode,
    )
    logger._wandb_init.pop("anonymous", None)  # Lightning passes what W&B no longer knows and warns of
    if mode == "online" and getattr(rank_zero_only, "rank", 0) == 0 and (reason := _begin_online(logger)) is not None:
        logger._wandb_init["mode"] = "offline"
        advice = f"`wandb sync {folder / 'wandb' / 'offline-run-*'}` uploads the run later"
        print(f"W&B cannot be used online ({reason}): logging offline; {advice}", file=sys.stderr, flush=True)
    return logger


def _begin_online(logger: WandbLogger) -> str | None:
    """Begin the logger's run online; return why that is not possible, within seconds."""
    import wandb

    if (reason := _unreachable(str(wandb.setup().settings.base_url))) is not None:
        return reason
    settings = wandb.Settings(init_timeout=INIT_SECONDS, login_timeout=INIT_SECONDS)
    logger._wandb_init["settings"] = settings
    try:
        _ = logger.experiment
    except wandb.errors.Error as error:
        del logger._wandb_init["settings"]
        wandb.teardown(exit_code=1)  # its process would keep the run's id
        return next(iter(str(error).strip().splitlines()), "") or "its server refused"
    return None


def _unreachable(address: str) -> str | None:
    """Return why a server gives no answer of any kind, or None where it gives one."""
    answers: Queue[str | None] = Queue()
    query = Request(f"{address}/graphql", b'{"query": "{__typename}"}', {"Content-Type": "application/json"})

    def ask() -> None:
        try:
            with urlopen(query, timeout=PROBE_SECONDS):
                answers.put(None)
        except HTTPError:
            answers.put(None)
        except (OSError, ValueError, HTTPException) as error:
            cause = getattr(error, "reason", error)
            answers.put(None if isinstance(cause, ssl.SSLError) else f"{address}: {cause}")

    Thread(target=ask, daemon=True).start()  # no timeout of sockets bounds the look-up of a name
    try:
        return answers.get(timeout=PROBE_SECONDS)
    except Empty:
        return f"{address} does not answer within {PROBE_SECONDS:g} seconds"


def wandb_agent_run() -> tuple[str, str] | None:
    """The sweep and the run that W&B's agent started this process for, or None."""
    sweep, run = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    return (sweep, run) if sweep and run else None


def log_table(logger: WandbLogger, key: str, columns: Mapping[str, Sequence[Any]], step: int) -> None:
    """Logs a table, PIL images in it as such, whose files W&B keeps in RUN/wandb until they are uploaded.

    It would keep them in the user's own folder, away from the offline run that refers to them.

    Args:
        logger: of the run folder.
        key: of the table.
        columns: title to cells, of equal numbers.
        step: optimizer steps behind it.
    """
    import wandb

    def cell(value: Any) -> Any:
        return wandb.Image(value) if isinstance(value, Image) else value

    rows = [[cell(value) for value in row] for row in zip(*columns.values(), strict=True)]
    given = os.environ.get("WANDB_DATA_DIR")
    os.environ["WANDB_DATA_DIR"] = given or str(Path(logger.save_dir or ".").resolve() / "wandb")
    try:
        logger.log_table(key, list(columns), rows, step=step)
    finally:
        if given is None:
            del os.environ["WANDB_DATA_DIR"]


def cascade_name(run_dir: str | Path) -> str | None:
    """The folder in which a cascade's runs lie side by side: "quickstart" of runs/quickstart/base.

    None for a run that lies by itself, in the working folder or in one called "runs".
    """
    parent = Path(run_dir).resolve().parent
    return None if parent.name in ("", "runs") or parent == Path.cwd() else parent.name


def _has_wandb_key() -> bool:
    """Whether W&B would find a key, without asking the network."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
