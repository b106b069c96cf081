"""`imagen-lightning report RUN_OR_EVAL … --out report.html`: one page to compare on."""

from __future__ import annotations

import sys
from pathlib import Path

from imagen_lightning.cli.arguments import Parser, file, real
from imagen_lightning.errors import counted


def parser() -> Parser:
    made = Parser(
        "report",
        description="Writes one self-contained HTML page of runs, evaluations and samples: a table, curves, Pareto "
        "plots, samples side by side, and what differs between configurations.",
    )
    made.add_argument(
        "folders",
        nargs="+",
        metavar="RUN_OR_EVAL",
        help="sweeps, run folders, evaluations, folders of samples, or folders that hold such",
    )
    made.add_argument("--out", type=file, default="report.html", metavar="FILE", help="the page (default report.html)")
    made.add_argument(
        "--megabytes",
        type=real(0, 10_000, open_low=True),
        default=24.0,
        metavar="N",
        help="what pictures of samples may take (default 24)",
    )
    return made


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    write(arguments.folders, arguments.out, int(arguments.megabytes * 2**20))
    return 0


def write(folders: list[str], out: str, most_bytes: int) -> None:
    """Writes the page, names on stderr what could not be used, and prints where the page is."""
    from imagen_lightning.report.page import refuse_other
    from imagen_lightning.report.report import build
    from imagen_lightning.report.sources import read_sources

    refuse_other(Path(out))
    sources = read_sources(folders)
    page = build(sources, most_bytes)
    size = page.write(out)
    for line in sources.problems.lines:
        print(f"imagen-lightning: warning: {line}", file=sys.stderr)
    parts = [
        counted(len(found), noun)
        for found, noun in (
            (sources.sweeps, "sweep"),
            (sources.runs, "run"),
            (sources.evaluations, "evaluation"),
            (sources.samples, "sample folder"),
        )
        if found
    ]
    print(f"Wrote {out} ({size / 2**20:.1f} MiB): {', '.join(parts)}; open it in a browser")
