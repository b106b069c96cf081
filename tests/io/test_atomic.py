"""Files appear whole or not at all, whoever else writes them."""

import ast
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

import imagen_lightning
from imagen_lightning.callbacks.checkpoint import WholeFileIO, _link, _remove_temporaries
from imagen_lightning.files import write_json
from imagen_lightning.images import save_png
from imagen_lightning.io.atomic import is_temporary, temporary_path, whole_file, write_bytes, write_text
from imagen_lightning.report.page import Page
from imagen_lightning.text import TinyTextEncoder
from imagen_lightning.text.cached import StatesFile, StatesWriter


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "old\r\n")
    with pytest.raises(ZeroDivisionError), whole_file(path) as temporary:
        temporary.write_text(str(1 / temporary.write_text("")))
    assert path.read_bytes() == b"old\r\n"
    assert [item.name for item in path.parent.iterdir()] == ["file.txt"]


def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError) as caught:
        write_text(tmp_path / "file" / "inside", "text")
    assert caught.value.filename == str(tmp_path / "file" / "inside")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as caught:
        write_text(tmp_path / "folder", "text")
    assert caught.value.filename == str(tmp_path / "folder")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file", "folder"]


def test_an_error_of_another_file_keeps_its_own_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, whole_file(tmp_path / "file"):
        (tmp_path / "missing").read_text()
    assert caught.value.filename == str(tmp_path / "missing")


def test_many_writers_of_one_file_never_collide(tmp_path):
    path, errors = tmp_path / "file", []

    def write(letter):
        try:
            for _ in range(200):
                write_bytes(path, letter * 1000)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c", b"d")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(set(path.read_bytes())) == 1
    assert len(path.read_bytes()) == 1000
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_a_temporary_file_is_known_by_its_name(tmp_path):
    assert is_temporary(temporary_path(tmp_path / "config.yaml"))
    assert not is_temporary(tmp_path / "config.yaml.partial")
    assert not is_temporary(tmp_path / ".lock")


# ---- who makes temporary names, and writers of one file at once

PACKAGE = Path(imagen_lightning.__file__).parent
OTHERS = {
    "data/class_images.py": "OUT.partial is a folder that a later start completes",
    "data/ingest/making.py": "a shard that is being made, which a later start finds and completes",
    "data/ingest/plan.py": "removes shards that a killed start left",
    "data/index.py": "as in io/atomic.py, with its own checks of a concurrent writer",
    "data/shard_cache.py": "the name reserves room in the cache for a size",
    "data/shards.py": "a shard that is being made",
    "evaluation/drawing.py": "a cache of images that processes fill together",
    "cli/fit_arguments.py": "knows what earlier versions left",
}


def test_temporary_names_are_made_in_one_place():
    found = set()
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE / "callbacks").resolve().rglob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = (
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        )
        if any(re.search(r"\.partial$", text) for text in texts):
            found.add(path.relative_to(PACKAGE).as_posix() if PACKAGE in path.parents else f"callbacks/{path.name}")
    assert found - OTHERS.keys() == {"io/atomic.py"}


def page_of(path):
    page = Page("A page")
    page.write(path)


def states_of(path):
    with StatesWriter(path, {"a": 1}, 4, "float16", {}) as writer:
        writer.write(["a"], TinyTextEncoder(4)(["a"]))


WRITERS = {
    "text": (lambda path: write_text(path, "text\n" * 1000), lambda path: path.read_text()),
    "json": (lambda path: write_json(path, {"a": [1] * 1000}), lambda path: json.loads(path.read_text())),
    "png": (lambda path: save_png(Image.new("RGB", (16, 16)), path), lambda path: Image.open(path).load()),
    "page": (page_of, lambda path: path.read_text().rindex("</html>")),
    "checkpoint": (
        lambda path: WholeFileIO().save_checkpoint({"x": torch.zeros(100)}, path),
        lambda path: torch.load(path, weights_only=True),
    ),
    "link": (lambda path: _link(path.parents[1] / "source", path), lambda path: path.read_text()),
    "text states": (states_of, lambda path: StatesFile(path).read("a")),
}


@pytest.mark.parametrize("name", WRITERS)
def test_writers_of_one_target_never_collide(tmp_path, name):
    write, read = WRITERS[name]
    (tmp_path / "source").write_text("source")
    path = tmp_path / "deep" / "target.html"
    path.parent.mkdir()
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(write, path) for _ in range(24)]:
            future.result()
    read(path)
    assert [item.name for item in path.parent.iterdir()] == ["target.html"]


def test_a_resumed_run_has_nothing_that_a_killed_process_left(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "checkpoints").mkdir()
    left = [tmp_path / "config.yaml", tmp_path / "samples" / "grid.png", tmp_path / "checkpoints" / "step-1.ckpt"]
    for path in left:
        temporary_path(path).write_text("half")
    mine = tmp_path / ".mine.partial"
    mine.write_text("not ours")
    _remove_temporaries(tmp_path)
    assert sum(map(is_temporary, tmp_path.rglob("*"))) == 2  # it may be any folder: checkpoints alone
    (tmp_path / "config.yaml").write_text("run: here")
    _remove_temporaries(tmp_path)
    assert not any(map(is_temporary, tmp_path.rglob("*")))
    assert mine.exists()
