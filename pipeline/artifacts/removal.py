"""Artifacts taken away, only such that nothing else was made from, each as a unit; and a cache's older generations."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tailrace.pipeline.artifacts.listing import Listed, list_artifacts
from tailrace.storage.artifact import storage_refused, sync_directory
from tailrace.storage.draft import NO_LOCKS, Lock
from tailrace.storage.errors import (
    ActionableError,
    ArtifactBusy,
    ArtifactMismatch,
    ArtifactMissing,
    StorageFull,
    raise_together,
)
from tailrace.storage.generations import Generations, unread
from tailrace.storage.labels import FILE as LABELS
from tailrace.storage.labels import read_labels
from tailrace.storage.names import is_being_written, is_temporary, temporary_path, temporary_paths_of

_REMOVED = "removed"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NAMED = 10
"""Artifacts whose paths a message names."""


def plan(paths: Sequence[Path], seen: Sequence[Path], *, is_forced: bool = False) -> list[Listed]:
    """Return the artifacts at ``paths``, with those inside them.

    Of what a killed command removed in part, nothing is returned. Raises ArtifactMissing for what is no artifact, and
    ArtifactMismatch, unless ``is_forced``, if an artifact in the folders ``seen`` that stays was made from them, or
    labels would be lost; with every problem.
    """
    problems = [problem for path in paths if (problem := _problem(path)) is not None]
    raise_together(problems)
    doomed = {one.path.resolve(): one for one in list_artifacts(*paths)}
    if not is_forced:
        staying = [one for one in list_artifacts(*seen) if one.path.resolve() not in doomed]
        raise_together([*_uses(list(doomed.values()), staying), *_labelled(doomed.values())])
    return list(doomed.values())


def _problem(path: Path) -> ActionableError | None:
    inside = list_artifacts(path)
    if path.is_symlink():
        return ArtifactMismatch(f"{path}: is a link, and what it leads to may be others'; remove the link with rm")
    if any(one.path == path for one in inside):
        return None
    if not inside:
        return None if path.absolute().parent.is_dir() and left_of(path) else ArtifactMissing.at(path)
    return ArtifactMismatch(f"{path}: is no artifact, but holds {len(inside)}; name those to remove: {_named(inside)}")


def _uses(doomed: Sequence[Listed], staying: Sequence[Listed]) -> Iterator[ActionableError]:
    for one in doomed:
        is_copied = any(one.identities and one.identities <= other.identities for other in staying)
        users = [other for other in staying if other.uses(one)]
        if users and not is_copied:
            yield ArtifactMismatch(
                f"{one.path}: {len(users)} that stay were made from it: {_named(users)}; name these, "
                "too, or give --force"
            )


def _labelled(doomed: Iterable[Listed]) -> Iterator[ActionableError]:
    for one in doomed:
        if _is_labelled(one.path):
            yield ArtifactMismatch(
                f"{one.path}: people labelled its features, and the labels would go, too; keep them, pipeline label "
                f"{one.path} --export FILE, then give --force"
            )


def _is_labelled(path: Path) -> bool:
    """Return whether somebody labelled the features of tables; of labels that cannot be read, whether there are any."""
    try:
        return (path / LABELS).exists() and bool(read_labels(path))
    except ActionableError:
        return True


@dataclass(frozen=True)
class Pruning:
    """Generations of a cache that are to be given up."""

    kept: Generations
    oldest: int
    """The oldest generation that is to be kept."""
    users: list[Listed]
    """Artifacts that were made from those before it."""

    @property
    def doomed(self) -> list[int]:
        """The generations that go."""
        return list(range(self.kept.pruned.oldest, self.oldest))

    @property
    def n_bytes(self) -> int:
        """Bytes that the disk gets back, of prunings that were cut off too."""
        return self.kept.bytes_freed(self.oldest)


def plan_pruning(cache: Path, keep: int, seen: Sequence[Path], *, is_forced: bool = False) -> Pruning:
    """Return what goes where the newest ``keep`` generations of a cache stay.

    Raises ArtifactMismatch, unless ``is_forced``, if an unfinished artifact in the folders ``seen`` was begun with a
    generation that would go: it could not be finished.
    """
    kept = Generations(cache)
    oldest = max(kept.pruned.oldest, kept.newest - keep + 1)
    doomed = {at.digest: at.generation for at in kept.manifests if at.generation < oldest}
    listed = list_artifacts(*seen, problems=[] if is_forced else None)
    users = [one for one in listed if not one.references.isdisjoint(doomed)]
    if (stranded := [one for one in users if not one.is_finished]) and not is_forced:
        first = min(doomed[digest] for one in stranded for digest in one.references & doomed.keys())
        raise ArtifactMismatch(
            f"{cache}: unfinished artifacts were begun with a generation that would go: {_named(stranded)}; finish or "
            f"remove them first, keep it with --keep {kept.newest - first + 1}, or give --force"
        )
    return Pruning(kept, oldest, users)


def _named(artifacts: Sequence[Listed]) -> str:
    more = f" and {len(artifacts) - _NAMED} more" if len(artifacts) > _NAMED else ""
    return ", ".join(str(one.path) for one in artifacts[:_NAMED]) + more


def remove(doomed: Sequence[Listed], paths: Sequence[Path] = ()) -> None:
    """Remove artifacts; what is inside another goes with it, and so does what a killed command left of ``paths``.

    Raises ArtifactBusy for what a process is writing, and for a cache that one is reading; StorageFull if the disk
    refuses.
    """
    for one in doomed:
        if one.path.exists():  # else it was inside another
            with _held(one.path):
                try:
                    _put_aside(one.path)
                except OSError as error:
                    raise storage_refused(error, one.path) from error
        _delete_put_aside(one.path)  # at once: the next one may be refused
    for path in paths:
        _delete_put_aside(path)


def _delete_put_aside(path: Path) -> None:
    """Delete what was taken away of an artifact, and what killed commands left of others beside it."""
    try:
        for aside in left_of(path):
            shutil.rmtree(aside)
        for entry in path.absolute().parent.iterdir():
            if is_temporary(entry.name) and (entry / _REMOVED).is_dir():
                shutil.rmtree(entry, ignore_errors=True)
    except FileNotFoundError:
        return  # was inside another
    except OSError as error:
        raise storage_refused(error, path) from error


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Keep writers of an artifact, and readers of a cache, out; raise ArtifactBusy if there are any.

    A finished one, too: a cache grows, tables get labels. Runs of a sweep are written under the sweep's lock. Where the
    file system has no locks, no process of this project writes; and a full disk is what this makes room on.
    """
    for outer in path.absolute().parents[:2]:
        if is_being_written(outer):
            raise ArtifactBusy(f"{path}: a process is writing in {outer}; wait for it to finish")
    lock = None
    try:
        lock = Lock(path)
    except StorageFull as error:
        if getattr(error.__cause__, "errno", None) not in (*NO_LOCKS, *_NO_ROOM):
            raise
    try:
        with unread(path):
            yield
    except BaseException:
        if lock is not None:
            lock.take_back()
        raise
    if lock is not None:
        lock.release()


def _put_aside(path: Path) -> None:
    """Take a folder away by its name first: what a killed process leaves is no artifact of the folder around it."""
    aside = temporary_path(path.absolute())
    aside.mkdir()
    path.rename(aside / _REMOVED)  # one level below, where folders of artifacts are not looked through
    sync_directory(aside.parent)


def left_of(path: Path) -> list[Path]:
    """Return the folders for an artifact of this path that is taken away: not yet, in part, or all but the folder."""
    return [aside for aside in temporary_paths_of(path) if aside.is_dir() and set(os.listdir(aside)) <= {_REMOVED}]
