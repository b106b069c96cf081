"""`imagen-lightning report` from the command line."""

import json

import pytest

from imagen_lightning.cli.main import main


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "base"
    folder.mkdir(parents=True)
    rows = "".join(f"{step},{1 / step}\n" for step in range(1, 100))
    (folder / "metrics.csv").write_text("step,train/loss\n" + rows)
    (folder / "run.json").write_text(json.dumps({"git": "abc", "command": "imagen-lightning fit"}))
    return folder


def test_writes_one_page_and_says_where(run, tmp_path, capsys):
    out = tmp_path / "new" / "report.html"
    assert main(["report", str(run.parent), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"Wrote {out} ({out.stat().st_size / 2**20:.1f} MiB): 1 run; open it in a browser\n"
    assert printed.err == ""
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    assert "<h1>base</h1>" in out.read_text()
    assert main(["report", str(run), "--out", str(out)]) == 0  # a page takes a page's place


def test_the_default_is_report_html_here(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", "runs"]) == 0
    assert (tmp_path / "report.html").is_file()


def test_what_is_broken_is_named_on_stderr(run, tmp_path, capsys):
    (run / "config.yaml").write_text("model: [")
    assert main(["report", str(run), str(tmp_path / "gone"), "--out", str(tmp_path / "r.html")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"imagen-lightning: warning: {tmp_path / 'gone'}: does not exist",
        f"imagen-lightning: warning: {run / 'config.yaml'}: is broken or half-written, and left out",
    ]


def refused(capsys, *arguments):
    assert main(["report", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_what_is_refused(run, tmp_path, capsys):
    assert "nothing to report on" in refused(capsys, tmp_path / "gone")
    assert "is a file; give the folder that holds it" in refused(capsys, run / "metrics.csv")
    assert "is a folder" in refused(capsys, run, "--out", tmp_path)
    (tmp_path / "notes.html").write_text("mine")
    assert "is no page of imagen-lightning" in refused(capsys, run, "--out", tmp_path / "notes.html")
    assert (tmp_path / "notes.html").read_text() == "mine"
    assert "argument --megabytes: '0' is outside (0, 10000]" in refused(capsys, run, "--megabytes", "0")
    assert "RUN_OR_EVAL" in refused(capsys)
