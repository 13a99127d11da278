"""The memory of a2c_breakout.py while it trains: resident size of the process and of its workers. Linux only.

    python benchmarks/breakout_memory.py                                              # 200,000 timesteps
    python benchmarks/breakout_memory.py --resume runs/default_seed1                  # any flags of the script

At each line that the script prints, the resident sizes go into benchmarks/results/breakout_memory.csv, in MB. The
summary compares the last row with that of timestep 20,000.
"""

import csv
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "breakout_memory.csv"


def resident_megabytes(pid: int) -> float:
    fields = Path(f"/proc/{pid}/status").read_text().split()
    return int(fields[fields.index("VmRSS:") + 1]) / 1024


def main() -> None:
    flags = sys.argv[1:] or ["--total-timesteps", "200080"]
    command = [sys.executable, "-u", ROOT / "a2c_breakout.py", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    rows = []
    for line in process.stdout:
        print(line, end="", flush=True)
        if line.startswith("finished timesteps"):
            timestep = int(line.split()[2].rstrip(","))
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            sizes = [resident_megabytes(process.pid), sum(map(resident_megabytes, workers))]
            rows.append([timestep, *(round(size, 1) for size in sizes)])
    with open(RESULT, "w", newline="") as file:
        csv.writer(file).writerows([["timestep", "process_mb", "workers_mb"], *rows])
    early = next(row for row in rows if row[0] >= 20_000)
    for name, before, after in zip(("process", "workers"), early[1:], rows[-1][1:]):
        print(f"{name}: {before} MB after {early[0]} timesteps, {after} MB after {rows[-1][0]}: {after / before - 1:+.1%}")
    sys.exit(process.wait())


if __name__ == "__main__":
    main()
