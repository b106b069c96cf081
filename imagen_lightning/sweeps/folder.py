"""A sweep's folder on one machine.

OUT holds `sweep.yaml` (the file as it was given), `sweep.json` (which study, whose trials), `study.db` (Optuna's study,
where no other is given), `trials/0003/` (each trial's run folder), `logs/0003.log` (what its program said) and
`samples/` (what evaluations drew, shared by all trials). Trials are numbered in the study, which machines may share;
each machine has an OUT of its own.
"""

from __future__ import annotations

import fcntl
import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagen_lightning.errors import InputError
from imagen_lightning.files import write_json
from imagen_lightning.sweeps.file import SweepFile

INFO, FILE, STUDY = "sweep.json", "sweep.yaml", "study.db"


@dataclass(frozen=True)
class SweepFolder:
    """Where a sweep's trials lie.

    Attributes:
        path: absolute.
        study: the storage's address.
        owner: a word by which the study's trials of this folder are known.
    """

    path: Path
    study: str
    owner: str

    def trial(self, number: int) -> Path:
        return self.path / "trials" / f"{number:04d}"

    def log(self, number: int) -> Path:
        return self.path / "logs" / f"{number:04d}.log"

    def process(self, number: int) -> Path:
        return self.path / "logs" / f"{number:04d}.lock"

    @property
    def is_alone(self) -> bool:
        """Whether the study is this folder's own, which no other machine shares."""
        return self.study == f"sqlite:///{self.path / STUDY}"

    @property
    def samples(self) -> Path:
        return self.path / "samples"


@contextmanager
def opened(path: Path, sweep: SweepFile, study: str | None) -> Iterator[SweepFolder]:
    """Makes or goes on with a sweep's folder, which one process has at a time.

    Raises:
        InputError: another process has it, it holds something else, or another study was given before.
    """
    path = path.absolute()
    known = path / INFO
    if path.exists() and not known.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"--out {str(path)!r} is not empty and holds no sweep; give another folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {str(path)!r} cannot be made: {error.strerror}; give another folder") from None
    with (path / ".lock").open("a+b") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"a sweep runs in {path}; wait for it, or give this one another --out and the same --study"
            ) from None
        yield _folder(path, sweep, study)


def _folder(path: Path, sweep: SweepFile, study: str | None) -> SweepFolder:
    info = read_info(path)
    if info is None:
        address = _absolute(study) if study is not None else f"sqlite:///{path / STUDY}"
        info = {"name": sweep.name, "study": address, "owner": secrets.token_hex(8), "metric": sweep.metric.name}
        shutil.copyfile(sweep.path, path / FILE)
        write_json(path / INFO, info)
    elif study is not None and _absolute(study) != info["study"]:
        raise InputError(f"{path} belongs to the study {info['study']}, not {study}; leave --study out")
    address = str(info["study"])
    if study is None and not Path(address.removeprefix("sqlite:///")).exists() and address.endswith(f"/{STUDY}"):
        address = f"sqlite:///{path / STUDY}"  # a folder that was moved takes its study along
    return SweepFolder(path, address, str(info["owner"]))


def read_info(path: Path) -> dict[str, Any] | None:
    """What sweep.json holds; None where there is none.

    Raises:
        InputError: it is none of a sweep's.
    """
    try:
        info = json.loads((path / INFO).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        info = None
    if not isinstance(info, dict) or not {"name", "study", "owner"} <= info.keys():
        raise InputError(f"{path / INFO} is not readable as a sweep's; move the folder away to begin anew")
    return info


def _absolute(study: str) -> str:
    """A study's address that is the same from every folder."""
    if "://" not in study:
        return str(Path(study).absolute())
    scheme, _, rest = study.partition(":///")
    if scheme == "sqlite" and rest and not rest.startswith("/"):
        return f"sqlite:///{Path(rest).absolute()}"
    return study
