"""A trial's program for tests: logs a metric like a training does, goes on where it was, obeys SIGTERM.

It logs (x - 3)^2 + 1/step. IMAGEN_LIGHTNING_RUN is its folder; `done` there counts the steps that it kept.
"""

import os
import signal
import sys
import time
from pathlib import Path

options = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])
run = Path(os.environ["IMAGEN_LIGHTNING_RUN"])
run.mkdir(parents=True, exist_ok=True)
x, steps = float(options["x"]), int(options.get("steps", 5))
pause, crash = float(options.get("pause", 0.02)), float(options.get("crash", "nan"))
asked = []
signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
with (run / "starts").open("a") as starts:
    starts.write(f"{os.getpid()} {os.environ.get('OMP_NUM_THREADS')} {os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
table = run / "metrics.csv"
if not table.exists():
    table.write_text("step,loss\n")
first = len(table.read_text().splitlines())
for step in range(first, steps + 1):
    if x == crash and step == 2:
        raise RuntimeError(f"x is {x}")
    time.sleep(pause)
    rows = table.read_text() + f"{step},{(x - 3) ** 2 + 1 / step}\n"
    partial = run / "metrics.csv.partial"
    partial.write_text(rows)
    partial.replace(table)
    if asked:
        sys.exit(143)
