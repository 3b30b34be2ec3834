"""Artifacts that are well sealed and mean harm: every value of every manifest exchanged, and files that are no files.

A manifest's digest says that it was not changed since it was written, not by whom. So whatever a stranger can seal, the
commands that open it refuse or take, run nothing of it, and read and write nothing outside. ``python -m
tests.faults.hostile --help``.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from tailrace.storage.artifact import MANIFEST, REQUEST, canonical_json, checksum_file
from tests.faults.fuzz import Counts, Outcome, judge
from tests.faults.inputs import RELEASED, sealed
from tests.faults.readers import run_command

SECRET = "the words of a file outside"
"""What no command may show or copy."""
HTML = "<img src=x onerror=alert(1)>"
SQL = "x\"'; COPY (SELECT 666) TO 'stolen'; --"
_TEXTS = (
    *("../outside/secret", "{outside}/secret", "/dev/zero", HTML, SQL, "k=2", "", "x" * 3000, "a\0b", "~", "*", "a/b"),
    *("a\nb", "\x1b[31m"),
)
_OTHERS: tuple[Any, ...] = (None, True, -1, 0, 2**62, 10**30, 1e308, 0.5, "x", [], {}, [[]], {"a": 1})

COMMANDS = {
    "": """
        info {a}
        info --json {a}
        ls {a}
        verify {a}
        rm {a}
        train {w}/caches/float32 --config {a} --out {o}
    """,
    "activation-cache": """
        shuffle {a} --epoch 3
        train {a} --k 2 --d-sae 4 --steps 1 --batch-rows 8 --out {o}
        analyze {w}/transcoders/topk --cache {a} --without-model --examples 2 --bands 2 --out {o}
        extend {a} --tokens 300
    """,
    "transcoder": """
        curves {a}
        pareto {a} --out {o}.html
        export {a} --to saelens --out {o}
        export {a} --to sparsify --out {o}
        export {a} --to circuit-tracer --scan x --out {o}
        analyze {a} --cache {w}/caches/float32 --without-model --examples 2 --bands 2 --out {o}
        train {w}/caches/float32 --from {a} --steps 1 --batch-rows 8 --out {o}
    """,
    "cross_layer_transcoder": """
        curves {a}
        pareto {a} --out {o}.html
        export {a} --to circuit-tracer --scan x --out {o}
        analyze {a} --cache {w}/caches/float32 --without-model --examples 2 --bands 2 --out {o}
    """,
    "tables": """
        query 'SELECT * FROM features, layers LIMIT 3' --tables {a}
        query --list --tables {a}
        label {a} --list
        label {a} 1 x
        dashboard {a} --feature 0-2 --window 4 --out {o}
        export {a} --to circuit-tracer-features --out {o}
        export {a} --to delphi --cache {w}/caches/float32 --out {o}
        blind draw --tables {a} --tables {w}/tables/relu --n 2 --min-active 1 --window 4 --out {o}
        blind study begin {o} --tables {a} --seed 1
        compare {a} {w}/tables/relu
    """,
    "sweep": """
        query 'FROM runs' --tables {a}
        curves {a}
        pareto {a} --out {o}.html
        export {a} --to saelens --out {o}
    """,
    "transcoders": """
        query 'FROM layers' --tables {a}
        export {a} --to sparsify --out {o}
        pareto {a} --out {o}.html
    """,
    "evaluation": """
        query 'FROM tokens LIMIT 1' --tables {a}
        pareto {a} {w}/transcoders/topk --out {o}.html
    """,
    "task": "query 'FROM curves' --tables {a}",
    "circuit": "steer x --transcoders {w}/transcoders/topk --from-circuit {a} --nodes 1=off --out {o}.html",
    "blind-comparison": "blind tally {a}",
    "export": """
        import {a} --from saelens --cache {w}/caches/float32 --out {o}
        import {a} --from sparsify --cache {w}/caches/float32 --out {o}
        import {a} --from circuit-tracer --cache {w}/caches/float32 --out {o}
    """,
}
"""Command lines that open an artifact {a} of a kind, or of any, beside released ones of {w}; output goes to {o}."""


ARTIFACTS = (
    *("caches/float32-zstd", "transcoders/topk", "transcoders/cross-layer", "imports/layer", "sweep", "tables/topk"),
    *("layers/circuits/transcoders", "evaluations/layers", "circuits/logit", "task", "dashboards/topk", "blind/draw"),
    *("exports/saelens", "exports/circuit-tracer", "exports/sparsify"),
)
"""Released artifacts of every kind."""


@dataclass(frozen=True)
class Case:
    """A way to make a released artifact hostile."""

    name: str
    artifact: str
    """Its path in the release."""
    make: Callable[[Path, Path], None]
    """Changes a copy of it; also given the folder outside, which holds the secret."""


def cases() -> list[Case]:
    """Return every case: one for each value of each manifest and each thing it may be, and those of files."""
    found = []
    for name in ARTIFACTS:
        for keys, value in _values(json.loads((RELEASED / name / MANIFEST).read_bytes())):
            found += [_exchange(name, keys, value, other) for other in _hostile(value)]
            found.append(_exchange(name, keys, value, _GONE))
        found += [Case(f"{name}: {label}", name, make) for label, make in _FILES.items()]
    return found


_GONE = object()


def _values(value: Any, keys: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Yield every value of a manifest but its digest; of lists and of files, the first three."""
    if keys and keys != ("digest",):
        yield keys, value
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    few = isinstance(value, list) or keys[-1:] in (("files",), ("metadata",))
    for key, part in itertools.islice(parts, 3 if few else None):
        yield from _values(part, (*keys, key))


def _hostile(value: Any) -> Iterator[Any]:
    """Yield what stands for a value."""
    yield from _OTHERS
    if isinstance(value, str):
        yield from _TEXTS
    if isinstance(value, dict) and value:  # a name of a file or a site
        first = next(iter(value))
        for text in _TEXTS:
            yield {text: value[first], **{key: part for key, part in value.items() if key != first}}


def _exchange(name: str, keys: tuple[str | int, ...], value: Any, other: Any) -> Case:
    what = "is gone" if other is _GONE else f"is {json.dumps(other)[:60]}"

    def make(path: Path, outside: Path) -> None:
        manifest = json.loads((path / MANIFEST).read_bytes())
        holder = manifest
        for key in keys[:-1]:
            holder = holder[key]
        if other is _GONE:
            del holder[keys[-1]]
        else:
            text = json.dumps(other, ensure_ascii=False).replace("{outside}", str(outside))
            holder[keys[-1]] = json.loads(text)
        write_manifest(path, manifest)

    return Case(f"{name}: {'.'.join(map(str, keys))} {what}", name, make)


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Seal and write a manifest, and the request that it records."""
    manifest.pop("digest", None)
    (path / MANIFEST).write_bytes(sealed(manifest))
    if isinstance(manifest.get("request"), dict):
        with contextlib.suppress(ValueError):
            (path / REQUEST).write_bytes(canonical_json(manifest["request"]))


def _of_a_file(change: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    """Return what changes the first file that a manifest lists, and records the checksum of what lies there then."""

    def make(path: Path, outside: Path) -> None:
        manifest = json.loads((path / MANIFEST).read_bytes())
        for key in ("files", "metadata"):
            for name in sorted(manifest.get(key, {}))[:3]:
                file = path / name
                change(file, outside)
                if file.is_file():
                    manifest[key][name] = {"bytes": file.stat().st_size, "checksum": checksum_file(file)}
        write_manifest(path, manifest)

    return make


def _link(file: Path, outside: Path) -> None:
    file.unlink()
    file.symlink_to(outside / "secret")


def _pipe(file: Path, _: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _device(file: Path, _: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def _loop(file: Path, _: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


def _written(data: bytes) -> Callable[[Path, Path], None]:
    def write(file: Path, _: Path) -> None:
        file.write_bytes(data)

    return write


def _raw(data: bytes) -> Callable[[Path, Path], None]:
    return lambda path, outside: _written(data)(path / MANIFEST, outside)


def _other_kind(path: Path, _: Path) -> None:
    manifest = json.loads((path / MANIFEST).read_bytes())
    write_manifest(path, {**manifest, "kind": "tables" if manifest["kind"] != "tables" else "transcoder"})


def _folder_of_links(path: Path, outside: Path) -> None:
    for entry in list(path.iterdir()):
        if entry.is_dir():
            shutil.move(entry, outside / entry.name)
            entry.symlink_to(outside / entry.name)


_FILES: dict[str, Callable[[Path, Path], None]] = {
    "files are links that lead outside": _of_a_file(_link),
    "files are pipes": _of_a_file(_pipe),
    "files are devices that never end": _of_a_file(_device),
    "files are links to themselves": _of_a_file(_loop),
    "files are empty": _of_a_file(_written(b"")),
    "files are deep JSON": _of_a_file(_written(b"[" * 50_000)),
    "files are of zeros": _of_a_file(_written(bytes(5000))),
    "files are a Parquet header alone": _of_a_file(_written(b"PAR1" + b"\xff" * 64 + b"PAR1")),
    "weights declare more than there is": _of_a_file(
        _written((200).to_bytes(8, "little") + json.dumps(
            {"W_enc": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 2**62]}}).ljust(200).encode())
    ),
    "the manifest is deep": _raw(b"[" * 50_000),
    "the manifest is deep objects": _raw(b'{"digest":' * 50_000),
    "the manifest is a number": _raw(b"9" * 5000),
    "the manifest is a list": _raw(b'["digest", "kind"]\n'),
    "it is of another kind": _other_kind,
    "folders are links that lead outside": _folder_of_links,
}  # fmt: skip


class Bench:
    """A folder in which hostile artifacts are opened, beside released ones and a folder that nothing may touch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.world, self.outside = folder / "world", folder / "outside"
        shutil.copytree(RELEASED, self.world)
        self.outside.mkdir()
        self._fresh()

    def _fresh(self) -> None:
        shutil.rmtree(self.outside)
        self.outside.mkdir()
        (self.outside / "secret").write_text(SECRET)

    def open(self, case: Case, line: str) -> Outcome:
        """Open a hostile artifact by a command line and return what comes of it."""
        shutil.rmtree(self.folder / "inside", ignore_errors=True)
        artifact, output = self.folder / "inside/artifact", self.folder / "inside/output"
        shutil.copytree(self.world / case.artifact, artifact)
        case.make(artifact, self.outside)
        before = self._seen()
        shown: list[str] = []
        words = [word.format(a=artifact, w=self.world, o=output) for word in shlex.split(line)]
        outcome = judge(lambda: shown.append(run_command(*words)))
        if outcome.problem is None and self._seen() != before:
            outcome = Outcome(False, "writes outside")
        if outcome.problem is None and SECRET in "".join([*shown, *_texts_below(output)]):
            outcome = Outcome(False, "shows a file outside")
        if self._seen() != before or case.name.endswith("outside"):
            self._fresh()
        return outcome

    def _seen(self) -> list[tuple[str, int, int]]:
        """Return what lies outside, and beside the artifact's and the output's folder: names, sizes and times."""
        places = [*self.outside.rglob("*"), *self.folder.iterdir(), *self.world.iterdir()]
        return [(str(path), (stat := path.lstat()).st_size * path.is_file(), stat.st_mtime_ns * path.is_file())
                for path in sorted(places)]  # fmt: skip


def _texts_below(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size < 1 << 20:
            yield path.read_text(errors="replace")


def lines_of(case: Case) -> list[str]:
    """Return the command lines that open the case's artifact."""
    kind = json.loads((RELEASED / case.artifact / MANIFEST).read_bytes())["kind"]
    return [line.strip() for text in (COMMANDS[""], COMMANDS.get(kind, "")) for line in text.strip().splitlines()]


def run(seed: int, seconds: float, *, inputs: int | None = None, only: str = "") -> Counts:
    """Open hostile artifacts in a random order until ``seconds`` are over; return what became of them."""
    pairs = [(case, line) for case in cases() for line in lines_of(case) if only in f"{case.name}: {line}"]
    random.Random(seed).shuffle(pairs)
    counts, end = Counts(f"{len(pairs):,} pairs of an artifact and a command"), time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        bench = Bench(Path(folder))
        for case, line in itertools.islice(pairs, inputs):
            if time.monotonic() > end:
                break
            counts.add(bench.open(case, line), f"{case.name}: {line}")
    return counts


@click.command()
@click.option("--seed", default=0)
@click.option("--seconds", default=60.0)
@click.option("--inputs", type=int, default=None)
@click.option("--only", default="", help="Part of a case's name and command line.")
def main(seed: int, seconds: float, inputs: int | None, only: str) -> None:
    """Open hostile artifacts and show what became of them."""
    counts = run(seed, seconds, inputs=inputs, only=only)
    click.echo(counts)
    sys.exit(bool(counts.failures))


if __name__ == "__main__":
    main()
