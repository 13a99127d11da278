"""The resident memory of a2c_breakout.py and of its workers while it trains. Linux only.

    python benchmarks/breakout_memory.py                             # 200,000 timesteps
    python benchmarks/breakout_memory.py --resume runs/long          # any flags of the script

At each line that the script prints, the sizes go into benchmarks/results/breakout_memory.csv, in
MiB. The summary compares the medians of the three rows around timestep 20,000 and of the last
three: single rows differ by the 15 MiB that a gradient step takes and gives back.
"""

import csv
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "breakout_memory.csv"


def resident_mib(pid: int) -> float:
    fields = Path(f"/proc/{pid}/status").read_text().split()
    return int(fields[fields.index("VmRSS:") + 1]) / 1024


def summary(rows: list[list]) -> None:
    middle = next((i for i, row in enumerate(rows) if row[0] >= 20_000), 1)
    early, late = rows[max(middle - 1, 0) : middle + 2], rows[-3:]
    for column, name in ((1, "process"), (2, "workers")):
        before, after = (statistics.median(row[column] for row in part) for part in (early, late))
        print(f"{name}: {before} MiB around {rows[middle][0]} timesteps, {after} MiB at "
              f"{rows[-1][0]}, {after / before - 1:+.1%}")  # fmt: skip


def main() -> None:
    flags = sys.argv[1:] or ["--total-timesteps", "200000"]
    command = [sys.executable, "-u", ROOT / "a2c_breakout.py", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    rows = []
    for line in process.stdout:
        print(line, end="", flush=True)
        if line.startswith("finished timesteps"):
            timestep = int(line.split()[2].rstrip(","))
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            sizes = [resident_mib(process.pid), sum(map(resident_mib, workers))]
            rows.append([timestep, *(round(size, 1) for size in sizes)])
    if process.wait():
        sys.exit(process.returncode)
    with open(RESULT, "w", newline="") as file:
        header = ["timestep", "process_mib", "workers_mib"]
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    summary(rows)


if __name__ == "__main__":
    main()
