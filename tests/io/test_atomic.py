"""Files appear whole or not at all, whoever else writes them."""

import threading

import pytest

from imagen_lightning.io.atomic import is_temporary, temporary_path, whole_file, write_bytes, write_text


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
