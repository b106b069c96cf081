"""Reads W&B's offline files back: what a run would upload."""

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path

BLOCK, HEADER, RECORD = 1 << 15, 7, 7  # bytes
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    """One file's content.

    Attributes:
        run: the run's record: entity, project, run_id, run_group, job_type, display_name.
        definitions: of metrics, the name or glob to the record.
        history: one {key: value} a logged row.
        config: key to value.
        tables: by key, the columns and rows of the last one; an image is the path of its file.
    """

    run: object = None
    definitions: dict = field(default_factory=dict)
    history: list = field(default_factory=list)
    config: dict = field(default_factory=dict)
    tables: dict = field(default_factory=dict)

    def rows(self, key):
        """(trainer/global_step, value) of the rows that have a key."""
        return [(row["trainer/global_step"], row[key]) for row in self.history if key in row]


def records(path: Path):
    """The protobuf messages of a file, which is a LevelDB log: blocks of records with CRC, length and type."""
    from wandb.proto import wandb_internal_pb2

    data, place, parts = path.read_bytes(), HEADER, []
    assert data[:4] == b":W&B"
    while place + RECORD <= len(data):
        if BLOCK - place % BLOCK < RECORD:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        if kind == 0:
            break
        parts.append(data[place + RECORD : place + RECORD + length])
        place += RECORD + length
        if kind in (FULL, LAST):
            yield wandb_internal_pb2.Record.FromString(b"".join(parts))
            parts = []


def read(folder: Path) -> OfflineRun:
    """The only offline run of a run folder."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    found = OfflineRun()
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            for item in record.run.config.update:
                found.config[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        elif kind == "metric":
            found.definitions[record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "history":
            items = record.history.item
            found.history.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items})
        elif kind == "artifact":
            files = {item.path: Path(item.local_path) for item in record.artifact.manifest.contents}
            for name in [name for name in files if name.endswith(".table.json")]:
                found.tables[name.removesuffix(".table.json")] = _table(files[name], files)
    return found


def _table(path, files):
    content = json.loads(path.read_text())
    rows = [[files[c["path"]] if isinstance(c, dict) else c for c in row] for row in content["data"]]
    return content["columns"], rows
