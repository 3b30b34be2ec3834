"""Inputs that are wrong in ways that users and strangers think of, drawn at random, and artifacts to damage."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tailrace.storage.artifact import MANIFEST, seal
from tests.support.paths import ROOT

RELEASED = ROOT / "tests/released/d14043a"
"""Small artifacts of every kind."""

# fmt: off
_ATOMS = (
    "", " ", "0", "1", "-1", "5", "²", "½", "५", "٣", "9" * 4301, "9" * 30, "1e400", "1e-400", "nan", "inf", "-inf",
    "1_0", "0x1f", "1e5", "1e12", "60M", "1.5GB", "2GiB", ",", ",,", ":", "::", "-", "--", "=", "=off", "=+3", "[", "]",
    "[5]", "[-1]", "[²]", f"[{'9' * 4301}]", "%", "1%", "/", "..", "../x", "/etc/passwd", "x" * 300, "a", "layer0",
    "kind", "blocks.0.mlp.hook_in", "blocks.0.attn.hook_z", "all", "none", "null", "true", "\n", "\t", "\r", "\0",
    "\u2028", "\ud800", "\udcff", "\U0001f600", "\x1b[31m", "'", '"', "\\", "$x", "{", "}", "{}", "[]", "*", "?", "~",
    "&a", "*a", "!!x", "!!python/object:os.system", "|", ">", "#", "2001-13-45", "12:30:99", "<<", "- ", ": ", "token",
    "!=", "<", ">=", "head", "feature", "K", "ﬃ", "İ", "ßßß", "[" * 20_000, '{"a":' * 20_000,
)
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 10**12, 10**30, -5, 0.5, 1e308, "", "x", "0", "../x", "/etc/passwd", [], {}, [1],
    {"a": 1}, [None], "9" * 40, 2**62, 2**63, 3.0, ["x", 1], {"bytes": 1}, "<script>", 'x" AS', "\udcff",
)
# fmt: on


class Inputs:
    """Random inputs, and a folder of released artifacts to damage; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.random = random.Random()
        self.folder = folder
        self.world = folder / "world"
        shutil.copytree(RELEASED, self.world)
        self.manifests = {
            str(path.parent.relative_to(self.world)): json.loads(path.read_bytes())
            for path in sorted(self.world.rglob(MANIFEST))
            if not {"runs", "epochs", "drafts"} & set(path.relative_to(self.world).parts)
        }

    def text(self, most: int = 6) -> str:
        """Return a few atoms in a row."""
        return "".join(self.random.choice(_ATOMS) for _ in range(self.random.randint(0, most)))

    def near(self, text: str) -> str:
        """Return a text with one to three changes."""
        parts = list(text)
        for _ in range(self.random.randint(1, 3)):
            at, choice = self.random.randint(0, len(parts)), self.random.random()
            if choice < 0.4 or not parts:
                parts.insert(at, self.random.choice(_ATOMS))
            elif choice < 0.7:
                parts.pop(min(at, len(parts) - 1))
            else:
                parts[min(at, len(parts) - 1)] = self.random.choice(_ATOMS)
        return "".join(parts)

    def any_of(self, *good: str) -> str:
        """Return one of some good texts, or something near it, or a text of atoms."""
        return self.random.choice([self.near(self.random.choice(good)), self.text(), self.random.choice(good)])

    def changed(self, value: Any) -> Any:
        """Return a JSON value of which one or two parts are deleted, exchanged or added."""
        value = copy.deepcopy(value)
        for _ in range(self.random.randint(1, 2)):
            holders = list(_holders(value))
            if not holders:
                return value
            holder = self.random.choice(holders)
            key = self.random.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            choice = self.random.random()
            if choice < 0.3:
                del holder[key]
            elif choice < 0.9 or isinstance(holder, list):
                holder[key] = copy.deepcopy(self.random.choice(_VALUES))
            else:
                holder[writable(self.text(2))] = copy.deepcopy(self.random.choice(_VALUES))
        return value

    def damaged(self, data: bytes) -> bytes:
        """Return bytes of which some are changed, deleted or cut off, or a text deep enough to exhaust a parser."""
        content, at = bytearray(data or b"\0"), self.random.randrange(len(data) or 1)
        choice = self.random.random()
        if choice < 0.4:
            content[at] = self.random.randrange(256)
        elif choice < 0.6:
            del content[at:]
        elif choice < 0.8:
            content[at:at] = self.text().encode(errors="surrogatepass")
        else:
            return self.random.choice(
                [b"[" * 50_000, b'{"a":' * 50_000, b'{"digest":' + b"9" * 5000 + b"}", b"\xff", b""]
            )
        return bytes(content)

    def file(self, name: str, data: bytes | str) -> Path:
        """Write a file and return its path."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode(errors="surrogatepass"))
        return path

    def jsonl(self, name: str, *lines: Any) -> Path:
        """Write lines of JSON, of which some are changed, and return the file's path."""
        texts = [json.dumps(self.changed(line), ensure_ascii=False) for line in lines]
        data = "\n".join(self.any_of(text) for text in texts)
        return self.file(name, data.encode(errors="surrogatepass") + self.random.choice([b"", b"\n", b"\xff\n", b"\0"]))

    @contextlib.contextmanager
    def replaced(self, path: Path, data: bytes) -> Iterator[Path]:
        """Have other bytes in a file inside."""
        before = path.read_bytes()
        path.write_bytes(data)
        try:
            yield path
        finally:
            path.write_bytes(before)

    @contextlib.contextmanager
    def resealed(self, *kinds: str) -> Iterator[Path]:
        """Have an artifact whose manifest is changed and sealed again inside."""
        name = self.random.choice(
            [name for name, known in self.manifests.items() if not kinds or known["kind"] in kinds]
        )
        manifest = self.changed({key: value for key, value in self.manifests[name].items() if key != "digest"})
        with self.replaced(self.world / name / MANIFEST, sealed(manifest)):
            yield self.world / name

    def scratch(self, name: str) -> Path:
        """Return a path at which nothing lies."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
        return path


def _holders(value: Any) -> Iterator[Any]:
    """Yield every object and list that is not empty; of long lists, the first entries."""
    parts = list(value.values()) if isinstance(value, dict) else value[:5] if isinstance(value, list) else []
    if isinstance(value, dict | list) and value:
        yield value
    for part in parts:
        yield from _holders(part)


def writable(text: str) -> str:
    return text.encode(errors="replace").decode()


def sealed(manifest: Any) -> bytes:
    """Seal a manifest; what cannot be text in UTF-8 becomes a question mark, as the writer's language would have it."""
    text = json.dumps(manifest, ensure_ascii=False, allow_nan=False)
    return seal(json.loads(writable(text)))
