"""``python -m benchmarks``: every benchmark that needs no environment of its own, at quick sizes.

Shows that they work and catches a collapse in speed; results worth quoting come from the scripts in full, on a quiet
machine. ``shuffle_worth`` needs a network the first time, for its text. The last line is one JSON object of all ratios.
"""

from __future__ import annotations

import json
import subprocess
import sys

QUICK = ("shuffle_plan", "memory", "write_shards", "read_batches", "shuffle_worth")


def main() -> None:
    ratios: dict[str, dict[str, float]] = {}
    for name in QUICK:
        command = [sys.executable, "-m", f"benchmarks.{name}", "--quick"]
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        print("\n".join(lines[:-1]), flush=True)
        ratios[name] = json.loads(lines[-1])
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
