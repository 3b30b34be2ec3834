"""Line-by-line JSON logs that a killed run can take up again without a line lost or doubled.

``metrics.jsonl`` belongs to the artifact and holds nothing that a rerun would give differently; what the clock says
goes to ``timing.jsonl``, which is not part of it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tailrace.storage.artifact import is_disk_refusal, storage_refused
from tailrace.storage.errors import NonFiniteActivation


class JsonLines:
    """An append-only file of one JSON object per line, cut back to ``n_bytes`` on opening."""

    def __init__(self, path: Path, n_bytes: int = 0) -> None:
        self.path = path
        self._file = path.open("ab")
        self._file.truncate(n_bytes)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line; keys keep their order.

        Raises NonFiniteActivation for a number that is none, StorageFull if the disk refuses.
        """
        try:
            line = json.dumps(record, allow_nan=False)
        except ValueError as error:
            wrong = [name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
            raise NonFiniteActivation(
                f"after step {record.get('step')}, {', '.join(wrong) or 'a score'} is not finite: the weights have "
                "grown too large. Start afresh with a lower lr or a gradient_clip"
            ) from error
        try:
            self._file.write(line.encode() + b"\n")
            self._file.flush()
        except OSError as error:
            if is_disk_refusal(error):
                raise storage_refused(error, self.path) from error
            raise

    def commit(self) -> int:
        """Make all lines survive a power cut; return the file's size in bytes."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
