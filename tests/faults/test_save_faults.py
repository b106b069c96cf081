"""Checkpoints that cannot be written, and signals meanwhile: the one before is whole, and the run goes on from it."""

import os
import random
import signal
import subprocess

import pytest
import torch
from kill_harness import MENDED, STEPS, Run, config, fork_server, write_shards

from imagen_lightning.callbacks import find_last
from imagen_lightning.cli.verify_resume import compare_runs, table


@pytest.fixture(scope="module")
def server():
    with fork_server() as context:
        yield context


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """The uninterrupted run, and the shards it saw."""
    folder = tmp_path_factory.mktemp("whole")
    write_shards(folder / "shards")
    run = Run(server, folder / "whole", config("shards", folder / "shards"))
    run.finish()
    return run, folder / "shards"


def refuse(run, whole, step, reason, mend):
    """Ends a run whose checkpoint after `step` cannot be written; checks what it says and leaves."""
    said = run.finish(exit_code=2)
    before = run.run / "checkpoints" / f"step-{step - 2}.ckpt"
    (line,) = [text for text in said.splitlines() if "imagen-lightning: error:" in text]
    assert said.endswith(f"{line}\n")
    assert "Traceback" not in said
    assert f"checkpoints/step-{step}.ckpt cannot be written: {reason}; {mend}; --resume continues from " in line
    assert line.endswith(f"checkpoints/step-{step - 2}.ckpt")
    assert not list(run.run.rglob("*.partial"))
    assert find_last(run.run) == before
    assert torch.load(before, weights_only=True)["global_step"] == step - 2


def assert_goes_on(run, whole):
    (run.folder / MENDED).touch()
    run.finish()
    found = compare_runs(whole.run, run.run)
    assert all(item.largest == 0.0 for item in found), table(found)


def size_of_a_checkpoint(whole):
    return find_last(whole.run).stat().st_size


def test_a_full_disk(server, whole, tmp_path):
    """Two checkpoints and a half have room."""
    size = 2.5 * size_of_a_checkpoint(whole[0]) / 1024
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(size)}k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a disk of a set size cannot be mounted: this needs the superuser")
    try:
        run = Run(server, tmp_path / "run", config("shards", whole[1]))
        (tmp_path / "run" / "run").symlink_to(folder)
        refuse(run, whole, 6, "No space left on device", "make room on that disk")
        subprocess.run(["mount", "-o", "remount,size=1g", str(folder)], check=True)
        assert_goes_on(run, whole[0])
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_limit_on_the_size_of_files(server, whole, tmp_path):
    limit = {"step": 5, "size": size_of_a_checkpoint(whole[0]) // 2}
    run = Run(server, tmp_path / "run", config("shards", whole[1]), callbacks={"SmallFiles": limit})
    refuse(run, whole, 6, "File too large", "raise the limit on the size of files (ulimit -f)")
    assert_goes_on(run, whole[0])


def test_a_folder_that_may_not_be_written(server, whole, tmp_path):
    tmp_path.chmod(0o755)
    run = Run(server, tmp_path / "run", config("shards", whole[1]), callbacks={"Deny": {"step": 5}})
    refuse(run, whole, 6, "Permission denied", "let this user write there")
    (run.run / "checkpoints").chmod(0o755)
    assert_goes_on(run, whole[0])


def test_a_signal_while_a_checkpoint_is_made(server, whole, tmp_path):
    number = signal.SIGTERM
    signals = {"steps": [4, 10], "number": int(number), "in_save": True}
    run = Run(server, tmp_path / "run", config("shards", whole[1]), workers=2, callbacks={"Signals": signals})
    for step in (4, 10):
        said = run.finish(exit_code=128 + number)
        assert f"{number.name}: the step is finished and a checkpoint written" in said
        assert find_last(run.run) == run.run / "checkpoints" / f"step-{step}.ckpt"  # no step more than that
        content = torch.load(run.run / "checkpoints" / "last.ckpt", weights_only=True)
        assert content["LaionDataModule"]["position"] == 4 * step
        assert not list(run.run.rglob("*.partial"))
    assert_goes_on(run, whole[0])


def test_sigterm_at_random_moments_of_saves(server, whole, tmp_path):
    generator = random.Random(5)
    run = Run(server, tmp_path / "run", config("shards", whole[1]))
    for _ in range(5):
        run.kill("save", generator.randint(1, 2), generator.random() * 0.008, signal.SIGTERM)
        assert not list(run.run.rglob("*.partial"))
        assert torch.load(find_last(run.run), weights_only=True)["global_step"] > 0
    assert_goes_on(run, whole[0])


@pytest.mark.skipif(os.name != "posix", reason="processes are not forked here")
def test_the_final_validation_is_made_up_after_a_signal_in_the_last_step(server, whole, tmp_path):
    signals = {"steps": [STEPS], "number": int(signal.SIGTERM)}
    run = Run(server, tmp_path / "run", config("shards", whole[1]), callbacks={"Signals": signals})
    run.finish(exit_code=128 + signal.SIGTERM)
    assert not (run.run / "checkpoints" / "last.ckpt").exists()
    assert_goes_on(run, whole[0])
