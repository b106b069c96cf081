"""A sweep's folder on one machine.

OUT holds `sweep.yaml` (the file as it was given), `sweep.json` (which study, whose trials), `study.db` (Optuna's study,
where no other is given), `trials/0003/` (each trial's run folder), `logs/0003.log` (what its program said) and
`samples/` (what evaluations drew, shared by all trials). Trials are numbered in the study, which machines may share;
each machine has an OUT of its own.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagen_lightning.errors import InputError
from imagen_lightning.files import write_json
from imagen_lightning.io.atomic import write_bytes
from imagen_lightning.io.locks import locked
from imagen_lightning.sweeps.file import SweepFile

INFO, FILE, STUDY, LOCK = "sweep.json", "sweep.yaml", "study.db", ".lock"


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
    def has_trials(self) -> bool:
        """Whether a trial was begun in this folder."""
        return _has_trials(self.path)

    @property
    def is_alone(self) -> bool:
        """Whether the study is this folder's own, which no other machine shares."""
        return self.study == f"sqlite:///{self.path / STUDY}"

    @property
    def samples(self) -> Path:
        return self.path / "samples"


@contextlib.contextmanager
def opened(path: Path, sweep: SweepFile, study: str | None) -> Iterator[SweepFolder]:
    """Make or resume a sweep's folder, which one process has at a time.

    A folder in which no trial was begun takes another file; one that was made here goes if an error comes before that.

    Raises:
        InputError: another process has it, it holds something else, or another sweep or study was given before.
    """
    path = path.absolute()
    try:
        others = [item for item in path.iterdir() if not item.name.startswith(LOCK)] if path.exists() else []
        if others and not (path / INFO).exists():
            raise InputError(f"--out {str(path)!r} is not empty and holds no sweep; give another folder")
        new = [folder for folder in (path, *path.parents) if not folder.exists()]
        advice = "wait for its end, or give this sweep another --out and the same --study"
        with locked(path / LOCK, f"sweep folder {path}", advice=advice):
            folder = _folder(path, sweep, study)
            try:
                yield folder
            except BaseException:
                if new and not folder.has_trials:
                    shutil.rmtree(path)
                    with contextlib.suppress(OSError):  # something else lies there by now
                        for parent in new[1:]:
                            parent.rmdir()
                raise
    except OSError as error:
        found = Path(str(error.filename))
        if error.filename is None or (path not in (found, *found.parents) and found not in path.parents):
            raise
        raise InputError(f"--out {str(path)!r} cannot be used: {error.strerror}; give another folder") from error


def _folder(path: Path, sweep: SweepFile, study: str | None) -> SweepFolder:
    info = read_info(path)
    if info is None or not _has_trials(path):
        before = info or {"study": f"sqlite:///{path / STUDY}", "owner": secrets.token_hex(8)}
        address = before["study"] if study is None else _absolute(study)
        info = {"name": sweep.name, "study": address, "owner": before["owner"], "metric": sweep.metric.name}
        write_bytes(path / FILE, sweep.path.read_bytes())
        write_json(path / INFO, info)
    elif info["name"] != sweep.name:
        raise InputError(f"{path} holds trials of the sweep {info['name']!r}, not {sweep.name!r}; give another --out")
    elif study is not None and _absolute(study) != info["study"]:
        raise InputError(f"{path} belongs to the study {info['study']}, not {study}; leave --study out")
    address = str(info["study"])
    if study is None and not Path(address.removeprefix("sqlite:///")).exists() and address.endswith(f"/{STUDY}"):
        address = f"sqlite:///{path / STUDY}"  # a folder that was moved takes its study along
    return SweepFolder(path, address, str(info["owner"]))


def _has_trials(path: Path) -> bool:
    return (path / "trials").exists() or (path / "logs").exists()


def read_info(path: Path) -> dict[str, Any] | None:
    """Return what sweep.json holds; None where there is none.

    Raises:
        InputError: it is not a sweep's.
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
