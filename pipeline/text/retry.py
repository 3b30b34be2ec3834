"""Which failures of a text stream are worth waiting for, and how long.

``datasets`` retries single reads by itself; what arrives here has already outlasted that, or was never retried.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

# The HTTP library below huggingface_hub has changed twice; its root error is always the first base of the hub's own.
HTTP_ERROR: type[BaseException] = HfHubHTTPError.__bases__[0]

_PERMANENT = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    gzip.BadGzipFile,
    OfflineModeIsEnabled,
)
_RETRIED_STATUS = (408, 429)

READ_DELAYS_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Waits between attempts to go on reading a stream that already worked."""

OPEN_DELAYS_SECONDS = (1.0, 2.0)
"""Waits between attempts to open a dataset: shorter, since the usual cause is a machine without a network."""

Result = TypeVar("Result")


def is_transient(error: BaseException, *, remote: bool) -> bool:
    """Tell whether the same read may succeed later.

    pyarrow reports corrupt bytes as a plain OSError without an error number; in a local file they will stay corrupt,
    while over a network they may have been a torn transfer.
    """
    if isinstance(error, _PERMANENT):
        return False
    if isinstance(error, HfHubHTTPError):
        status = getattr(error.response, "status_code", None)
        return status is None or status >= 500 or status in _RETRIED_STATUS
    if isinstance(error, OSError):
        return remote or type(error) is not OSError or error.errno is not None
    return isinstance(error, HTTP_ERROR)


def retry_opening(action: Callable[[], Result], sleep: Callable[[float], None]) -> Result:
    """Return what ``action`` returns, waiting and trying again after transient failures; the last one is raised."""
    for delay in OPEN_DELAYS_SECONDS:
        try:
            return action()
        except (OSError, HTTP_ERROR) as error:
            if not is_transient(error, remote=True):
                raise
            sleep(delay)
    return action()
