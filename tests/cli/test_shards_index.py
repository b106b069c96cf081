"""`shards index` and `shards verify`: what they print, what they leave, and their exit codes."""

import os
from pathlib import Path

import pytest

from imagen_lightning.cli import shards as verbs
from imagen_lightning.cli.main import main
from imagen_lightning.cli.shards import index as index_verb
from imagen_lightning.data.index import index_shard
from imagen_lightning.data.shards import IMAGE, ShardWriter


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    with ShardWriter(folder, "train", 10) as writer:
        for number in range(25):
            members = {"jpg": bytes([number]) * 900, "txt": b"t%d" % number, "json": b'{"width": 8, "caption": "x"}'}
            writer.write(f"{number:04d}", members)
    for file in folder.glob("*.index"):
        file.unlink()
    return folder


def run(capsys, *arguments):
    code = main(["shards", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err


def flip(path, kind, row):
    """Flips a bit of a member and leaves the file's times as they were."""
    status = path.stat()
    place = int(index_shard(path).spans[row, kind, 0]) + 1
    data = bytearray(path.read_bytes())
    data[place] ^= 8
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_index_says_what_there_is_and_leaves_an_index_beside_each_shard(shards, capsys):
    code, lines, _ = run(capsys, "index", shards)
    assert code == 0
    assert [line.split(": ", 1)[1] for line in lines[:3]] == [
        "10 samples, 0.0 MB, with SHA-256",
        "10 samples, 0.0 MB, with SHA-256",
        "5 samples, 0.0 MB, with SHA-256",
    ]
    assert lines[3].startswith("3 shards, 25 samples, 0.1 MB")
    assert lines[4] == "members: 25 jpg, 25 json, 25 txt"
    assert lines[5] == "fields of the json: caption, width"
    assert lines[6] == "faults: none"
    assert "samples/s" in lines[7]
    assert len(list(shards.glob("*.tar.index"))) == 3
    before = {file: file.stat().st_mtime_ns for file in shards.iterdir()}
    run(capsys, "index", f"{shards}/train-*.tar")
    assert {file: file.stat().st_mtime_ns for file in shards.iterdir()} == before
    run(capsys, "index", f"{shards}/train-{{00000..00002}}.tar", "--force")
    assert all(file.stat().st_mtime_ns > before[file] for file in shards.glob("*.index"))


def test_index_counts_faults_by_reason(shards, capsys):
    path = shards / "train-00000.tar"
    os.truncate(path, 9000)
    with ShardWriter(shards, "other", 10) as writer:
        writer.write("a", {"txt": b"no image"})
        writer.write("b", {"jpg": b"no caption"})
    _, lines, _ = run(capsys, "index", shards)
    assert next(line for line in lines if line.startswith("faults")) == (
        "faults: 1 image missing, 1 caption missing or empty, 1 truncated shard"
    )
    assert f"{path}: 2 samples, 1 left out, 0.0 MB, with SHA-256" in lines


def test_many_shards_get_a_summary_alone(shards, capsys, monkeypatch):
    monkeypatch.setattr(index_verb, "_MAX_LINES", 2)
    _, lines, _ = run(capsys, "index", shards, "--no-hashes")
    assert lines[0].startswith("3 shards")
    assert not index_shard(shards / "train-00000.tar").hashed


def test_verify_needs_hashes(shards, capsys):
    run(capsys, "index", shards, "--no-hashes")
    code, _, error = run(capsys, "verify", shards)
    assert code == 2
    assert "has no SHA-256 to be compared with; run `imagen-lightning shards index" in error
    assert run(capsys, "index", shards)[0] == 0
    code, lines, _ = run(capsys, "verify", shards)
    assert code == 0
    assert lines[0] == "3 shards, 25 samples: all as they were indexed"


@pytest.mark.parametrize("by_processes", [False, True])
def test_verify_names_every_damaged_sample(shards, capsys, monkeypatch, by_processes):
    run(capsys, "index", shards)
    flip(shards / "train-00001.tar", IMAGE, 4)
    flip(shards / "train-00001.tar", 1, 7)
    os.truncate(shards / "train-00002.tar", 9000)
    monkeypatch.setattr(index_verb, "_MIN_BYTES", 0 if by_processes else 2**30)
    code, lines, _ = run(capsys, "verify", shards, "--workers", 2)
    assert code == 1
    assert lines[:5] == [
        f"'0014' in {shards}/train-00001.tar: hash mismatch",
        f"'0017' in {shards}/train-00001.tar: hash mismatch",
        f"{shards}/train-00002.tar: changed since it was indexed (size or time)",
        f"'0022' in {shards}/train-00002.tar: truncated shard",
        f"'0023' in {shards}/train-00002.tar: truncated shard",
    ]
    assert lines[6] == "3 shards, 25 samples: 3 truncated shard, 2 hash mismatch"
    assert run(capsys, "verify", shards / "train-00000.tar")[0] == 0


def test_verify_changes_nothing(shards, capsys):
    run(capsys, "index", shards)
    os.truncate(shards / "train-00002.tar", 9000)
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in shards.iterdir()}
    run(capsys, "verify", shards)
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in shards.iterdir()} == before


@pytest.mark.parametrize("verb", ["index", "verify"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing-*.tar"], "match no file"),
        ([], "required: SHARDS"),
        (["pipe:cat a.tar"], "only local files"),
        (["ftq://host/a.tar", "--cache", "CACHE"], "cannot be opened: Protocol not known"),
    ],
)
def test_what_the_user_can_mend_ends_with_code_2(tmp_path, capsys, verb, arguments, message):
    code, _, error = run(capsys, verb, *(str(tmp_path) if word == "CACHE" else word for word in arguments))
    assert code == 2
    assert message in error
    assert len(error.splitlines()) == 1


def test_the_verbs_are_listed(capsys):
    assert {"index", "verify"} <= set(verbs.VERBS)
    for verb in ("index", "verify"):
        with pytest.raises(SystemExit):
            main(["shards", verb, "--help"])
        assert f"imagen-lightning shards {verb}" in capsys.readouterr().out
    assert Path(index_verb.__file__).name == "index.py"
