"""Small text files for tests of the text stream."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa

from tailrace.pipeline.text.dataset import open_documents
from tailrace.pipeline.text.settings import TextSettings
from tailrace.pipeline.text.stream import DocumentStream


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_texts(path: Path, n: int, start: int = 0) -> Path:
    return write_jsonl(path, [{"text": f"document {start + i}"} for i in range(n)])


def zstandard(*frames: bytes) -> bytes:
    """Return one frame for each piece, one after the other, as a parallel compressor writes them."""

    class Kept(BytesIO):
        def close(self) -> None:
            """Stay readable after the compressor closed it."""

    packed = Kept()
    for frame in frames:
        with pa.CompressedOutputStream(packed, "zstd") as compressor:
            compressor.write(frame)
    return packed.getvalue()


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstandard}


def open_text(
    dataset: Path | str, *, seed: int = 0, shuffle_window: int = 0, kept: Sequence[str] = (), **settings: Any
) -> DocumentStream:
    chosen = TextSettings(dataset=str(dataset), shuffle_window=shuffle_window, **settings)
    return open_documents(chosen, seed, kept=kept, sleep=refuse_to_sleep)


def refuse_to_sleep(seconds: float) -> None:
    raise AssertionError(f"waited {seconds} s although nothing was transient")


def texts_of(stream: DocumentStream) -> list[str | None]:
    return [document.text for document in stream]
