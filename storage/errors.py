"""Every error a user can act on, as one tree.

The command line prints these without a traceback; anything else is a bug in this project and keeps its
traceback. A message says what, where, what was there, what was wanted, and the next step.

::

    ActionableError
    ├── SettingsError            a setting, or a combination of settings, that cannot be honoured
    ├── TextError                the dataset: unreadable, no usable column, too short, empty
    ├── ModelError               the language model: not found, unknown hook, wrong tokenizer
    │   └── OutOfMemoryError     the device ran out of memory; says which batch size to try
    ├── ArtifactError            a published directory
    │   ├── ArtifactMissing      nothing there
    │   ├── ArtifactIncomplete   a draft that was never published
    │   ├── ArtifactBusy         another process is writing it
    │   ├── ArtifactMismatch     made from other settings, another model or another input
    │   ├── LabelConflict        another edit of the same label came first
    │   └── ArtifactCorrupt      bytes differ from their recorded checksum, or a file is gone
    ├── WorkerLostError          worker processes ended in the middle of a task
    ├── NonFiniteActivation      NaN or infinity where an activation should be
    ├── NoOrdinaryRows           a step of training that max_norm_multiple leaves no row
    ├── ActivationOverflow       a value that the chosen storage dtype cannot hold
    └── StorageFull              the disk is full or refuses to be written
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence


class ActionableError(Exception):
    """An error whose message tells the user what to do next."""


class SettingsError(ActionableError):
    """One or more settings cannot be honoured; the message lists all of them."""


class TextError(ActionableError):
    """The text or token source cannot be used as asked."""


class ModelError(ActionableError):
    """The language model cannot be used as asked."""


class OutOfMemoryError(ModelError):
    """A device's memory ran out; the message says what to make smaller."""


class DeviceLostError(ModelError):
    """A GPU stopped working in the middle; the message says how to go on."""


class WorkerLostError(ActionableError):
    """A task cost every worker process that it got; no setting is wrong, and what is finished is kept."""


def explained(error: OSError, otherwise: str) -> tuple[str, str]:
    """Return why the system refused, and the next step: ``otherwise`` unless the reason asks for another."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return reason, _NEXT_STEPS.get(error.errno or 0, otherwise)


_MORE_FILES = "raise the limit of open files (ulimit -n) or do less at once"
_NEXT_STEPS = {
    errno.EMFILE: _MORE_FILES,
    errno.ENFILE: _MORE_FILES,
    errno.ELOOP: "a link there leads in a circle, or is none that may be followed; replace it by a file or folder",
}


_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error of Python or torch says that memory ran out, on the host or on a device."""
    # torch's own class for it has "out of memory" in its text; for a CPU it raises RuntimeError
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | OSError) and any(sign in text for sign in _OUT_OF_MEMORY)
    )


class ArtifactError(ActionableError):
    """A published directory is not what the caller needs."""


class ArtifactMissing(ArtifactError):
    """No artifact lies at this path."""

    @classmethod
    def at(cls, path: object) -> ArtifactMissing:
        """Return the error of a path at which there is nothing to be shown, checked or removed."""
        return cls(f"{path}: no cache, transcoder, tables or other artifact lies here; check the path")


class ArtifactIncomplete(ArtifactError):
    """A draft lies at this path; it was never published."""


class ArtifactBusy(ArtifactError):
    """Another process is writing this artifact."""


class ArtifactMismatch(ArtifactError):
    """The artifact was made with other settings or from other inputs."""


class LabelConflict(ArtifactError):
    """A label was edited since the editor looked at it."""


class ArtifactCorrupt(ArtifactError):
    """Bytes on disk differ from what was recorded when they were written."""


class NonFiniteActivation(ActionableError):
    """A NaN or infinite activation or loss."""


class NoOrdinaryRows(ActionableError):
    """All rows of a step are longer than ``max_norm_multiple`` allows, which only the step itself shows."""


class ActivationOverflow(ActionableError):
    """An activation lies outside the range of the storage dtype."""


class StorageFull(ActionableError):
    """Writing failed because the disk is full or read-only."""


def raise_together(problems: Sequence[ActionableError]) -> None:
    """Raise one error with every problem, of their class if they share one; return if there is none."""
    if problems:
        kinds = {type(problem) for problem in problems}
        kind = kinds.pop() if len(kinds) == 1 else ActionableError
        raise kind("\n".join(dict.fromkeys(map(str, problems)))) from problems[0]
