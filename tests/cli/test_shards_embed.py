"""`imagen-lightning shards embed`: estimates, resuming after a kill, processes that share, and refusals."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import torch
import yaml

from imagen_lightning.cli.main import main
from imagen_lightning.data.embed import Settings, readable_bytes, readable_time
from imagen_lightning.text import T5TextEncoder, TinyTextEncoder
from imagen_lightning.text.cached import StatesFile
from imagen_lightning.types import InputError

COMMAND = [sys.executable, "-m", "imagen_lightning", "shards", "embed"]


def write_shards(folder, sizes, words=6, prefix="train"):
    """Shards of captions of 1 to `words` words; none has an image, which embedding never looks at."""
    folder.mkdir(exist_ok=True)
    number = 0
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"{prefix}-{shard:03d}.tar", "w") as tar:
            for _ in range(size):
                caption = " ".join(f"word{number + place}" for place in range(number % words + 1)).encode()
                info = tarfile.TarInfo(f"{number:06d}.txt")
                info.size = len(caption)
                tar.addfile(info, io.BytesIO(caption))
                number += 1
    return str(folder)


def write_byt5(folder, scale=1.0):
    import transformers

    torch.manual_seed(0)
    config = transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=384)
    model = transformers.T5EncoderModel(config)
    model.encoder.final_layer_norm.weight.data.mul_(scale)
    model.save_pretrained(folder)
    transformers.ByT5Tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def byt5(tmp_path_factory):
    return write_byt5(tmp_path_factory.mktemp("models") / "tiny-byt5")


def embed(*arguments):
    return main(["shards", "embed", *map(str, arguments)])


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_embeds_says_what_it_takes_and_goes_on(tmp_path, capsys):
    shards, out = write_shards(tmp_path / "shards", [20, 30, 10]), tmp_path / "states"
    assert embed(shards, out, "--encoder", "tiny", "--estimate-only") == 0
    said = capsys.readouterr().out
    assert not out.exists()
    assert "tiny-bytes-d128-s0: 128 features, at most 32 tokens, stored as float16" in said
    assert "3 shards to do: about 60 captions of 3.5 tokens, 0.0% of them 32 tokens or cut to that" in said
    assert re.search(r"about [\d.]+ kB; [\d,]+ captions/s on cpu: about \d+ s\n", said)
    assert embed(shards, out, "--encoder", "tiny") == 0
    said = capsys.readouterr().out
    assert "3 shards, 63 captions, " in said  # the empty one in each
    assert f"LaionDataModule(…, text_states={str(out)!r})" in said
    whole = contents(out)
    assert list(whole) == ["train-000.safetensors", "train-001.safetensors", "train-002.safetensors"]
    (out / "train-001.safetensors").unlink()
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert embed(shards, out, "--encoder", "tiny") == 0
    said = capsys.readouterr().out
    assert "1 shard to do (2 are done): about 30 captions" in said
    assert "1 shard, 31 captions, " in said
    assert contents(out) == whole
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert embed(shards, out, "--encoder", "tiny") == 0
    assert "nothing to do: 3 shards stored in" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_the_estimate_is_what_it_comes_to(tmp_path, capsys, dtype):
    shards, out = write_shards(tmp_path / "shards", [300] * 20, words=20), tmp_path / "states"
    assert embed(shards, out, "--encoder", "tiny", "--dtype", dtype) == 0
    said = capsys.readouterr().out
    number, unit = re.search(r"about ([\d.]+) (kB|MB);", said).groups()
    size = sum(path.stat().st_size for path in out.iterdir())
    assert float(number) * {"kB": 1e3, "MB": 1e6}[unit] == pytest.approx(size, rel=0.03)  # 16 of 20 shards sampled
    captions = int(re.search(r"about ([\d,]+) captions", said)[1].replace(",", ""))
    assert captions == pytest.approx(6000, rel=0.03)


def test_the_states_are_those_of_the_t5_named(tmp_path, byt5, capsys):
    shards, out = write_shards(tmp_path / "shards", [7]), tmp_path / "states"
    options = ["--length", "12", "--precision", "bfloat16", "--clean-captions", "--batch-size", "3"]
    with pytest.warns(UserWarning, match="cut to 12 tokens"):
        assert embed(shards, out, "--encoder", byt5, *options) == 0
    encoder = T5TextEncoder(byt5, 12, "bfloat16", clean_captions=True)
    states = StatesFile(out / "train-000.safetensors")
    assert {name: states.metadata[name] for name in encoder.identity()} == encoder.identity()
    with tarfile.open(tmp_path / "shards" / "train-000.tar") as tar:
        captions = [tar.extractfile(member).read().decode() for member in tar]
    live = encoder(captions)
    for number, caption in enumerate(captions):
        expected = live.states[number, live.mask[number]]
        torch.testing.assert_close(states.read(caption).states[0], expected, rtol=2e-2, atol=2e-2)
    assert "0 of them" not in capsys.readouterr().out


def test_a_stages_yaml_names_the_encoder(tmp_path, byt5, capsys):
    shards, out = write_shards(tmp_path / "shards", [3]), tmp_path / "states"
    config = tmp_path / "stage.yaml"

    def write(encoder):
        config.write_text(yaml.safe_dump({"model": {"init_args": {"text": {"encoder": encoder}}}}))

    write({"class_path": "imagen_lightning.text.TinyTextEncoder", "init_args": {"dim": 20, "seed": 3}})
    assert embed(shards, out, "--encoder", config) == 0
    assert StatesFile(out / "train-000.safetensors").metadata["encoder"] == TinyTextEncoder(20, seed=3).name
    arguments = {"name_or_path": byt5, "padding": "attended", "max_tokens": 40}
    write({"class_path": "imagen_lightning.text.T5TextEncoder", "init_args": arguments})
    assert embed(shards, tmp_path / "t5", "--encoder", config) == 0
    states = StatesFile(tmp_path / "t5" / "train-000.safetensors")
    assert states.metadata["padding"] == "attended"
    assert states.read("").states.shape == (1, 40, 8)
    capsys.readouterr()
    assert embed(shards, out, "--encoder", config, "--length", 9) == 2
    assert "--length: the encoder's settings are those of" in capsys.readouterr().err
    write({"class_path": "os.path.PurePath"})
    assert embed(shards, out, "--encoder", config) == 2
    write(None)
    assert embed(shards, out, "--encoder", config) == 2
    assert "has no text encoder under model.init_args.text.encoder" in capsys.readouterr().err


def test_other_states_in_the_folder_are_refused_by_both_names(tmp_path, byt5, capsys):
    shards, out = write_shards(tmp_path / "shards", [3, 3]), tmp_path / "states"
    assert embed(shards, out, "--encoder", byt5, "--length", 20) == 0
    before = contents(out)
    (out / "train-001.safetensors").unlink()
    name = T5TextEncoder(byt5).name

    def refused(message, *options):
        capsys.readouterr()
        assert embed(shards, out, *options) == 2
        assert re.search(message, capsys.readouterr().err)

    refused(f"encoder is '{name}' there and 'tiny-bytes-d128-s0' now", "--encoder", "tiny")
    refused("max_tokens is '20' there and '128' now", "--encoder", byt5)
    refused("dtype is 'float16' there and 'int8' now", "--encoder", byt5, "--length", 20, "--dtype", "int8")
    refused("precision is 'float32' there and 'bf", "--encoder", byt5, "--length", 20, "--precision", "bfloat16")
    refused("caption_field is '' there and 'alt' now", "--encoder", byt5, "--length", 20, "--caption-field", "alt")
    other = write_byt5(tmp_path / "other" / "tiny-byt5", scale=1.5)
    assert T5TextEncoder(other).name == name
    refused("weights is '[0-9a-f]{16}' there and '[0-9a-f]{16}' now", "--encoder", other, "--length", 20)
    write_shards(tmp_path / "shards", [300, 3])
    refused(r"source_bytes is '\d+' there and '\d+' now", "--encoder", byt5, "--length", 20)
    assert contents(out) == {"train-000.safetensors": before["train-000.safetensors"]}


@pytest.mark.parametrize(
    ("scale", "options", "message"),
    [
        (float("nan"), ["--dtype", "int8"], "gives NaN or infinite states for caption"),
        (1e6, [], "is too large for float16 .*; store int8"),
    ],
)
def test_states_that_cannot_be_stored_leave_nothing(tmp_path, capsys, scale, options, message):
    shards, out = write_shards(tmp_path / "shards", [3]), tmp_path / "states"
    assert embed(shards, out, "--encoder", write_byt5(tmp_path / "model", scale), *options) == 2
    assert re.search(message, capsys.readouterr().err)
    assert contents(out) == {}


def test_what_cannot_be_used_is_counted(tmp_path, capsys):
    folder = tmp_path / "shards"
    folder.mkdir()
    members = {"0.txt": b"a dog", "1.txt": b"caf\xe9", "2.json": b"{", "3.json": b'{"caption": ["a cat", "a dog"]}'}
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert embed(folder, tmp_path / "states", "--encoder", "tiny") == 0
    said = capsys.readouterr().out
    assert "1 shard, 3 captions" in said
    assert "2 samples skipped: 1 caption not UTF-8, 1 bad JSON" in said
    assert embed(folder, tmp_path / "other", "--encoder", "tiny", "--caption-field", "alt") == 2
    assert "no caption of" in capsys.readouterr().err


def test_arguments_are_refused_with_their_mend(tmp_path, capsys, monkeypatch):
    shards, out = write_shards(tmp_path / "shards", [3]), tmp_path / "states"
    write_shards(tmp_path / "more", [3])
    bad = [
        ([tmp_path / "none", out, "--encoder", "tiny"], "match no file"),
        ([shards, tmp_path / "more", out, "--encoder", "tiny"], "several shards are called 'train-000'"),
        ([shards, out, "--encoder", "tiny", "--batch-size", 0], "argument --batch-size: '0' is outside [1, 1000000]"),
        ([shards, out, "--encoder", "tiny", "--length", 0], "argument --length: '0' is outside [1, 100000]"),
        ([shards, out, "--encoder", "tiny", "--revision", "x"], "--revision: the encoder 'tiny' has no such setting"),
        ([shards, out, "--encoder", "/no/such/folder"], "'/no/such/folder' does not exist"),
        ([shards, out, "--encoder", "tiny", "--device", "abacus"], "device 'abacus' cannot be used here"),
        ([shards, out, "--encoder", tmp_path / "none.yaml"], "none.yaml' does not exist"),
        ([shards, out], "required: --encoder"),
        ([shards, "--encoder", "tiny"], "required: OUT"),
    ]
    for arguments, message in bad:
        assert embed(*arguments) == 2, arguments
        assert message in capsys.readouterr().err
    assert not out.exists()
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert embed(shards, out, "--encoder", "tiny") == 2
    assert "RANK 2 must be from 0 to WORLD_SIZE - 1" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "two")
    assert embed(shards, out, "--encoder", "tiny") == 2
    assert "RANK 'two' is no whole number" in capsys.readouterr().err
    with pytest.raises(InputError, match="dtype 'int4' of stored states is unknown"):
        Settings(dtype="int4")


def test_a_disk_without_room_is_refused_at_once(tmp_path, capsys, monkeypatch):
    usage = type("Usage", (), {"free": 10**6})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    shards, out = write_shards(tmp_path / "shards", [3]), tmp_path / "states"
    assert embed(shards, out, "--encoder", "tiny") == 2
    message = r"take about [\d.]+ kB, 67.1 MB more are to stay free, and .* has 1.0 MB left: .*or store int8"
    assert re.search(message, capsys.readouterr().err)
    assert not out.exists()


def test_a_full_disk_leaves_the_files_that_are_whole(tmp_path):
    """The file size limit of a process stands for the disk's: the larger shard does not fit."""
    shards, out = write_shards(tmp_path / "shards", [10, 2000], words=20), tmp_path / "states"
    command = f"ulimit -f 400; exec {' '.join(COMMAND)} {shards} {out} --encoder tiny"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "train-001.safetensors cannot be written: File too large" in done.stderr
    assert list(contents(out)) == ["train-000.safetensors"]


def start(*arguments, **environment):
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def test_two_processes_share_the_shards(tmp_path, capsys):
    shards = write_shards(tmp_path / "shards", [10, 20, 30, 40, 50])
    assert embed(shards, tmp_path / "alone", "--encoder", "tiny") == 0
    processes = [
        start(shards, tmp_path / "states", "--encoder", "tiny", RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "process 1 of 2: 3 shards, 93 captions, " in said[0][0]
    assert "process 2 of 2: 2 shards, 62 captions, " in said[1][0]
    assert "captions/s" in said[0][0]
    assert "with 2 processes" in said[0][0]
    assert "captions/s" not in said[1][0]
    assert contents(tmp_path / "states") == contents(tmp_path / "alone")


def test_a_killed_run_goes_on_where_it_was(tmp_path, capsys):
    shards, out = write_shards(tmp_path / "shards", [300] * 6, words=30), tmp_path / "states"
    options = ["--encoder", "tiny", "--batch-size", "1"]
    assert embed(shards, tmp_path / "whole", *options) == 0
    expected = contents(tmp_path / "whole")
    process = start(shards, out, *options)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        names = {path.name for path in out.iterdir()} if out.exists() else set()
        if names & expected.keys() and any(name.endswith(".partial") for name in names):
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.001)
    said = process.communicate()
    assert process.returncode == -signal.SIGKILL, said
    left = {name: data for name, data in contents(out).items() if not name.endswith(".partial")}
    assert 1 <= len(left) < 6
    assert left == {name: expected[name] for name in left}
    capsys.readouterr()
    assert embed(shards, out, *options) == 0
    assert (
        f"{6 - len(left)} shards to do ({len(left)} are done)".replace("1 shards", "1 shard") in capsys.readouterr().out
    )
    assert contents(out) == expected


def test_the_metadata_is_text(tmp_path):
    shards = write_shards(tmp_path / "shards", [3])
    assert embed(shards, tmp_path / "states", "--encoder", "tiny", "--caption-field", "caption") == 2
    assert embed(shards, tmp_path / "states", "--encoder", "tiny") == 0
    metadata = StatesFile(tmp_path / "states" / "train-000.safetensors").metadata
    assert metadata == {
        "format": "imagen-lightning text states",
        "version": "1",
        "encoder": "tiny-bytes-d128-s0",
        "max_tokens": "32",
        "mask": "tokens",
        "dtype": "float16",
        "caption_field": "",
        "source": "train-000",
        "source_bytes": str((tmp_path / "shards" / "train-000.tar").stat().st_size),
    }
    assert json.loads(json.dumps(metadata)) == metadata


def test_readable_numbers():
    sizes = [readable_bytes(number) for number in (512, 1500, 2.5e6, 3.14e12, 5e15)]
    assert sizes == ["512 bytes", "1.5 kB", "2.5 MB", "3.1 TB", "5000.0 TB"]
    times = [readable_time(seconds) for seconds in (3.2, 100, 3000, 9000, 400_000)]
    assert times == ["3 s", "2 min", "50 min", "2.5 h", "4.6 days"]
