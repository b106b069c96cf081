"""Processes that are measured in turns, so that what slows the machine slows all of them; and their memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Kind = tuple[str, str]  # a peer's name and a precision
FLAG = "--worker"


def serve(worker: Callable[[str, str, dict[str, int]], None]) -> bool:
    """Runs `worker(name, precision, shape)` where this process was started by `take_turns`; False elsewhere."""
    if sys.argv[1:2] != [FLAG]:
        return False
    worker(sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))
    return True


def answer(record: dict[str, Any]) -> None:
    """What a worker says: first its facts, then one record for each line on its stdin."""
    print(json.dumps(record), flush=True)


def memory(field: str) -> int:
    """A field of this process's status in bytes, e.g. VmHWM, the peak of what it held (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}; this benchmark needs Linux")


def take_turns(
    script: str, kinds: list[Kind], shape: dict[str, int], rounds: int
) -> tuple[dict[Kind, dict[str, Any]], dict[Kind, list[dict[str, Any]]]]:
    """Starts one process a kind and asks each in turn, `rounds` times; gives their facts and their records."""
    processes = {}
    facts = {}
    for name, precision in kinds:
        command = [sys.executable, script, FLAG, name, precision, json.dumps(shape)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes[name, precision], facts[name, precision] = process, _next_record(process)
    records: dict[Kind, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, process in processes.items():
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            records[kind].append(_next_record(process))
    for process in processes.values():
        process.communicate()
    return facts, records


def _next_record(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit(f"a benchmarked process ended early: {process.args}")


def write(result: dict[str, Any], out: Path | None) -> None:
    """Prints `result` with its "rows" as a Markdown table, and writes it as JSON where a file is named."""
    rows = result["rows"]
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}))
    print("| " + " | ".join(rows[0]) + " |\n|" + " --- |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
