"""Claim: at least 6 times the rows per second of SAELens' activation cache, writing and reading.

SAELens caches one hook per cache and has no bfloat16, so both sides store one hook of float16 of equal width, fed with
activations that are ready. Each side runs in processes of its own, in turn.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import Contender, Rates, Work, measure
from benchmarks.peers import environment, run_script
from benchmarks.report import Report, parse_arguments, scratch_folder

SAELENS = "sae-lens==6.54.12"
WIDTH = 768
BATCH_ROWS = 4096
WRITE_OURS, WRITE_THEIRS = "write: ours", "write: SAELens CacheActivationsRunner"
WRITE_SYNCED = "write: SAELens, its files then synced"
GATHERED, MATERIALISED = "read: ours, gathered", "read: ours, materialised"
MIXED, SLICES = "read: SAELens ActivationsStore (mixing buffer)", "read: SAELens' files, consecutive Arrow slices"


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    unit_rows, rounds = (32_768, 2) if arguments.quick else (262_144, 4)
    python = environment("saelens", [SAELENS, "psutil"])
    with scratch_folder(arguments) as folder:
        sides = Sides(folder, python, unit_rows)
        rates = measure(sides.writers(), max(2, rounds - 1))
        rates.update(measure(sides.readers(), rounds))
    report = Report(
        "saelens_cache",
        "Beside SAELens' activation cache",
        f"One hook of {WIDTH} float16, alternating processes; {4 * unit_rows:,} rows written, {max(2, rounds - 1)} "
        f"rounds; {3 * unit_rows:,} rows read, {rounds} rounds, page cache warm. SAELens: CacheActivationsRunner.run "
        "with consolidation, its language model replaced by ready activations, which syncs nothing by itself; and "
        f"ActivationsStore over the result (64 contexts in its mixing buffer, batches of {BATCH_ROWS:,}). Ours: units "
        f"of {unit_rows:,} rows shuffled, with statistics and checksums, synced and published, the memory of two "
        "units touched beforehand as in any long run; reading through CacheSplit.stream, gathered in runs of "
        f"{unit_rows // 96:,} rows. SAELens mixes neighbouring contexts, ours is a uniformly random order.",
        ("what", "krow/s", "ours × theirs"),
        ("numpy", "zarr", "torch"),
        extra_versions={"SAELens' environment": ", ".join(f"{k} {v}" for k, v in sides.versions.items())},
    )
    for name in rates.by_name:
        to = {WRITE_OURS: WRITE_THEIRS, GATHERED: MIXED, MATERIALISED: MIXED}.get(name)
        against = f"{rates.ratio(name, to):.3g} ({rates.spread(name, to)})" if to else ""
        report.rows.append((name, f"{rates.median(name) / 1e3:.4g}", against))
    report.ratios = ratios(rates)
    report.targets = {name: "≥ 6" for name in list(report.ratios)[:3]}
    report.finish(arguments)


def ratios(rates: Rates) -> dict[str, float]:
    """Return ours over theirs; end to end is writing a cache and reading it once."""

    def seconds(write: str, read: str) -> float:
        return 1 / rates.median(write) + 1 / rates.median(read)

    return {
        "write_vs_saelens": rates.ratio(WRITE_OURS, WRITE_THEIRS),
        "gathered_read_vs_saelens": rates.ratio(GATHERED, MIXED),
        "materialised_read_vs_saelens": rates.ratio(MATERIALISED, MIXED),
        "write_vs_saelens_synced": rates.ratio(WRITE_OURS, WRITE_SYNCED),
        "write_and_gathered_read_vs_saelens": seconds(WRITE_THEIRS, MIXED) / seconds(WRITE_OURS, GATHERED),
        "gathered_read_vs_arrow_slices": rates.ratio(GATHERED, SLICES),
        "materialised_read_vs_arrow_slices": rates.ratio(MATERIALISED, SLICES),
    }


class Sides:
    """Both sides' files and the processes that make and read them."""

    def __init__(self, folder: Path, python: Path, unit_rows: int) -> None:
        self._folder, self._python, self._unit_rows, self._n_rows = folder, python, unit_rows, 3 * unit_rows
        self.versions: dict[str, str] = {}
        sizes = {"n_rows": self._n_rows, "width": WIDTH}
        self._theirs({"task": "write", "path": str(folder / "theirs"), "shard_rows": unit_rows // 2, **sizes})
        short = {"shard_rows": unit_rows // 32, "bucket_rows": unit_rows}
        self._ours({"task": "write", "path": str(folder / "ours"), **short, **sizes})
        self._ours({"task": "materialise", "path": str(folder / "ours")})

    def _theirs(self, arguments: dict[str, Any]) -> float:
        found = run_script(self._python, "saelens_theirs.py", arguments)
        self.versions = found["versions"]
        return float(found["seconds"])

    def _ours(self, arguments: dict[str, Any]) -> float:
        return float(run_script(sys.executable, "saelens_ours.py", arguments)["seconds"])

    def writers(self) -> list[Contender]:
        """Return the two writers; what they write is deleted after each run."""
        target = self._folder / "written"
        n_rows = 4 * self._unit_rows
        task = {"task": "write", "path": str(target), "n_rows": n_rows, "width": WIDTH}
        ours, theirs = {**task, "shard_rows": self._unit_rows}, {**task, "shard_rows": self._unit_rows // 2}

        def clear() -> None:
            shutil.rmtree(target)

        return [
            Contender(WRITE_OURS, lambda: Work(n_rows, self._ours(ours)), clear=clear),
            Contender(WRITE_THEIRS, lambda: Work(n_rows, self._theirs(theirs)), clear=clear),
            Contender(WRITE_SYNCED, lambda: Work(n_rows, self._theirs({**theirs, "sync": True})), clear=clear),
        ]

    def readers(self) -> list[Contender]:
        """Return the readers; those that prefetch a bucket at a time skip two buckets, then read three."""
        sizes = {"batch_rows": BATCH_ROWS, "n_rows": self._n_rows}
        ours = {"task": "read", "path": str(self._folder / "ours"), "skipped_rows": 2 * self._unit_rows, **sizes}
        theirs = {"path": str(self._folder / "theirs"), "width": WIDTH, "skipped_rows": 2 * BATCH_ROWS, **sizes}
        return [
            Contender(GATHERED, lambda: Work(self._n_rows, self._ours({**ours, "order": "gathered"}))),
            Contender(MATERIALISED, lambda: Work(self._n_rows, self._ours({**ours, "order": "materialised"}))),
            Contender(MIXED, lambda: Work(self._n_rows, self._theirs({**theirs, "task": "read_store"}))),
            Contender(SLICES, lambda: Work(self._n_rows, self._theirs({**theirs, "task": "read_slices"}))),
        ]


if __name__ == "__main__":
    main()
