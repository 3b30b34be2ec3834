"""What ``--json`` prints of artifacts that a command has made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tailrace.pipeline.shared.run_options import echo_json


def echo_made(*paths: Path, **more: Any) -> None:
    """Print an artifact as ``pipeline info --json`` shows it, with its path and ``more``; several as ``artifacts``."""
    from tailrace.pipeline.artifacts.info_stage import describe  # which loads what commands' help does without

    made = [{"path": str(path), **describe(path)} for path in paths]
    echo_json({**(made[0] if len(made) == 1 else {"artifacts": made}), **more})
