"""Safetensors files, one tensor at a time, against the library that defines them."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from imagen_lightning.cascade.tensors import DTYPES, StoredTensor, read_header, read_tensors, write_tensors
from imagen_lightning.types import InputError


def tensors():
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, dtype in DTYPES.items():
        bits = torch.randint(0, 2, (3 * 5 * dtype.itemsize,), dtype=torch.uint8, generator=generator)
        made[f"all/{name}"] = bits.view(dtype).view(3, 5)
    return made | {
        "größe": torch.arange(2.0),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
        "channels_last": torch.rand(2, 3, 4, 5, generator=generator).contiguous(memory_format=torch.channels_last),
        "every other": torch.arange(10)[::2],
    }


def read(path):
    digest = hashlib.sha256()
    found = dict(read_tensors(path, read_header(path), digest))
    assert digest.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype
        assert value.shape == other[key].shape
        assert torch.equal(value, other[key]), key


def test_what_is_written_the_library_reads(tmp_path):
    sha256 = write_tensors(tmp_path / "a.safetensors", tensors())
    assert sha256 == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    same(load_file(tmp_path / "a.safetensors"), tensors())


def test_what_the_library_writes_is_read(tmp_path):
    save_file({key: value.contiguous() for key, value in tensors().items()}, tmp_path / "a.safetensors", {"by": "it"})
    same(read(tmp_path / "a.safetensors"), tensors())


def test_tensors_of_one_type_make_the_librarys_bytes(tmp_path):
    values = {key: torch.rand(3, 4) for key in ("b.weight", "a.bias", "a.weight")}
    write_tensors(tmp_path / "own.safetensors", values)
    save_file(values, tmp_path / "library.safetensors")
    assert (tmp_path / "own.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()


def test_tensors_that_share_memory_are_written_apart(tmp_path):
    whole = torch.arange(6.0)
    write_tensors(tmp_path / "a.safetensors", {"whole": whole, "part": whole[2:4], "again": whole})
    same(read(tmp_path / "a.safetensors"), {"part": whole[2:4], "whole": whole, "again": whole})


def test_no_tensors_make_a_file_too(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {})
    assert load_file(tmp_path / "a.safetensors") == {} == read(tmp_path / "a.safetensors")


def test_a_file_is_not_overwritten_and_foreign_numbers_are_refused(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {})
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "a.safetensors", {})
    with pytest.raises(InputError, match=r"'x' is of torch.complex128, which cannot be saved"):
        write_tensors(tmp_path / "b.safetensors", {"x": torch.ones(1, dtype=torch.complex128)})
    save_file({"x": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "c.safetensors")
    with pytest.raises(InputError, match=r"c.safetensors': 'x' is of type F8_E4M3; use one of F64, F32"):
        read_header(tmp_path / "c.safetensors")


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: data[:4]])
def test_a_file_that_ends_elsewhere_than_its_header_says_is_refused(tmp_path, change):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.ones(3)})
    header = read_header(path)
    assert header == {"x": StoredTensor(torch.float32, (3,), 0)}
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=r"a.safetensors' are damaged"):
        read_header(path)
    with pytest.raises(InputError, match=r"a.safetensors' have changed while they were read"):
        dict(read_tensors(path, header, hashlib.sha256()))
