"""A published directory is complete or absent: manifests, checksums, atomic files.

``manifest.json`` is written last, so only an artifact that has it is complete. Until then the
directory is a draft (``tailrace.storage.draft``): it holds ``request.json`` (what was asked for) and whatever is
finished so far, and only the process that holds its lock may write to it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import xxhash
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from tailrace.storage.errors import (
    ArtifactCorrupt,
    ArtifactIncomplete,
    ArtifactMismatch,
    ArtifactMissing,
    StorageFull,
    explained,
)
from tailrace.storage.formats import refuse_newer
from tailrace.storage.names import (
    RESTORE,
    discard,
    inside,
    is_being_written,
    is_plural,
    refuse_lost,
    remove_abandoned,
    temporary_path,
    with_article,
)
from tailrace.storage.parsing import parse_json, read_regular, shown

logger = logging.getLogger(__name__)

JSON = Any
"""A value that ``json`` can write: null, bool, number, string, list or string-keyed mapping of these."""

MANIFEST = "manifest.json"
REQUEST = "request.json"
_DISK_REFUSALS = {errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EIO}


def canonical_json(value: JSON) -> bytes:
    """Return the canonical JSON text of ``value``: sorted keys, two spaces, a final newline; NaN is refused."""
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def digest(value: JSON) -> str:
    """Return ``sha256:…`` of the canonical JSON text of ``value``."""
    return "sha256:" + hashlib.sha256(canonical_json(value)).hexdigest()


def checksum_bytes(data: bytes) -> str:
    """Return the ``xxh3:…`` checksum (128 bits) of bytes."""
    return "xxh3:" + xxhash.xxh3_128(data).hexdigest()


def checksum_file(path: Path) -> str:
    """Return the ``xxh3:…`` checksum (128 bits) of a file's bytes."""
    with path.open("rb", buffering=0) as file:
        return "xxh3:" + hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def storage_refused(error: OSError, path: Path) -> StorageFull:
    """Return the error, with its next step, for an OSError of a write to ``path``."""
    reason, step = explained(error, "free some space or fix the permissions")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return StorageFull(f"{path}: cannot be written ({reason}); choose another path")
    return StorageFull(
        f"{path}: cannot be written ({reason}). Everything finished so far is kept: "
        f"{step}, then run the same command again to continue"
    )


def unreadable(error: OSError, path: Path) -> ArtifactCorrupt:
    """Return the error, with its next step, for an OSError of a read of ``path``."""
    reason, step = explained(error, "check its permissions and the disk, or restore it from a copy")
    return ArtifactCorrupt(f"{path}: cannot be read ({reason}); {step}")


def is_disk_refusal(error: OSError) -> bool:
    """Return whether the disk refused a write: full, read-only, no permission, or failing."""
    return error.errno in _DISK_REFUSALS


def sync_directory(path: Path) -> None:
    """Make renames inside ``path`` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_directory(path: Path) -> None:
    """Remove a directory, if there is one, with what is in it; of a link, the link. Raises StorageFull."""
    try:
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise storage_refused(error, path) from error


def make_directory(path: Path) -> list[Path]:
    """Make a directory and the ones above it, so that they survive a power cut; return those that were missing.

    Raises StorageFull if the disk refuses.
    """
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    missing.reverse()
    for directory in missing:
        try:
            directory.mkdir(exist_ok=True)
        except OSError as error:
            if is_disk_refusal(error):
                raise storage_refused(error, directory) from error
            raise
        sync_directory(directory.parent)
    return missing


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` so that ``path`` holds either its old bytes or all the new ones, whatever happens.

    Raises StorageFull if the disk refuses, ArtifactMismatch if ``path`` is no regular file.
    """
    refuse_replacing(path)
    temporary = temporary_path(path)
    try:
        _write_synced(temporary, data)
        temporary.rename(path)
        sync_directory(path.parent)
    except OSError as error:
        discard(temporary)
        if is_disk_refusal(error):
            raise storage_refused(error, path) from error
        raise


def write_output(path: Path, data: bytes) -> None:
    """Write a file that a user asked for as ``write_atomically`` does; delete what killed commands left of it."""
    remove_abandoned(path)
    write_atomically(path, data)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a directory whose files appear at ``path`` all at once at the end, or never.

    Raises ArtifactMismatch if something lies at ``path``, StorageFull if the disk refuses.
    """
    remove_abandoned(path)
    temporary = temporary_path(path)
    make_directory(temporary)
    try:
        yield temporary
        try:
            sync_directory(temporary)
            temporary.rename(path)  # onto nothing, or an empty directory
            sync_directory(path.parent)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise ArtifactMismatch(f"{path}: something lies here already; choose another path") from error
            raise storage_refused(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_replacing(path: Path) -> None:
    """Raise ArtifactMismatch if ``path`` is a pipe, a device or anything else that a regular file must not replace."""
    if path.exists() and not path.is_file():
        raise ArtifactMismatch(f"{path}: is no regular file, so it is not replaced; give another path")


def _write_synced(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        written = 0
        while written < len(data):
            # a disk that fills up takes what fits and only refuses the next call
            written += os.write(descriptor, memoryview(data)[written:])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(root: Path, names: Iterable[str]) -> None:
    """Make files under ``root``, and their names, survive a power cut.

    Raises ArtifactCorrupt for names outside, StorageFull if the disk refuses: a full one may say so only here.
    """
    folders: set[Path] = set()
    try:
        for path in (inside(root, name) for name in names):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            folders |= {folder for folder in path.parents if folder.is_relative_to(root)}
        for folder in sorted(folders):
            sync_directory(folder)
    except OSError as error:
        raise storage_refused(error, root) from error


def read_json(path: Path) -> Any:
    """Return the JSON value in a file; raise ArtifactCorrupt if it is gone or not JSON."""
    return _parse_json(read_bytes(path), path)


def read_bytes(path: Path) -> bytes:
    """Return what a file holds; raise ArtifactCorrupt if it is gone, the disk refuses or it may never end."""
    try:
        return read_regular(path)
    except ValueError as error:
        raise ArtifactCorrupt(f"{path}: {error}; {RESTORE}") from error
    except FileNotFoundError as error:
        raise ArtifactCorrupt(f"{path}: is missing; {RESTORE}") from error
    except OSError as error:
        raise unreadable(error, path) from error


def _parse_json(data: bytes, path: Path) -> Any:
    try:
        return parse_json(data)
    except ValueError as error:
        raise ArtifactCorrupt(f"{path}: is not valid JSON ({error}); {RESTORE}") from error


KEEPING = ConfigDict(extra="allow", strict=True)
"""A type of JSON objects that keeps keys it does not know: a newer version may have written them."""


class Record(BaseModel):
    """A JSON object in an artifact. Keys that this version does not know are kept."""

    model_config = ConfigDict(**KEEPING, frozen=True)

    @classmethod
    def read_file(cls, path: Path) -> Self:
        """Return the record in a file; raise ArtifactCorrupt if it is gone, not JSON or of another shape."""
        return cls.parse(read_bytes(path), path)

    @classmethod
    def parse(cls, data: bytes, path: Path) -> Self:
        """Return the record in the bytes of a file; raise ArtifactCorrupt with every key that is wrong."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            problems = [f"\n  {_describe(problem)}" for problem in error.errors(include_url=False)[:_LISTED]]
            more = f"\n  and {error.error_count() - _LISTED:,} more" if error.error_count() > _LISTED else ""
            raise ArtifactCorrupt(f"{path}: is not as wanted; {RESTORE}:{''.join(problems)}{more}") from error

    def as_json(self) -> dict[str, JSON]:
        """Return the object as it was read, with the keys that this version does not know."""
        return self.model_dump(mode="json", exclude_unset=True)


_LISTED = 20
"""Problems of a file that a message lists."""


def shaped(record: type[Record], *, or_empty: bool = False) -> AfterValidator:
    """Return a check that a JSON object has the keys of ``record``; it stays the ``dict`` that it is."""

    def check(value: dict[str, JSON]) -> dict[str, JSON]:
        try:
            if value or not or_empty:
                record.model_validate(value)
        except ValidationError as error:
            raise ValueError("; ".join(map(_describe, error.errors(include_url=False)))) from error
        return value

    return AfterValidator(check)


def _describe(problem: Any) -> str:
    """Return the key that is wrong, what was wanted, and what is there instead."""
    there = "" if problem["type"] == "missing" else f" (got {shown(problem['input'])})"
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}{there}"


Count = Annotated[int, Field(ge=0, lt=2**63)]
"""A number of bytes, rows or the like, or an index."""


class FileRecord(Record):
    """What is known of a file that an artifact vouches for."""

    bytes: Count
    checksum: str


class Manifest(Record):
    """What a published artifact says of itself; each kind has a class of its own that names the other keys."""

    of_kind: ClassVar[str]
    """The artifact's kind."""
    instead: ClassVar[Mapping[str, str]] = {}
    """The next step to report for each wrong kind."""

    kind: str
    digest: str
    """Of the manifest without this key."""
    request: dict[str, JSON]
    """What was asked for."""
    files: dict[str, FileRecord]
    """Every file by its name below the artifact's folder."""

    @classmethod
    def read(cls, path: Path, kind: str | None = None) -> Self:
        """Return the manifest of the artifact at ``path``; the base class reads what is common to all, of any ``kind``.

        Raises ArtifactMissing, ArtifactIncomplete, ArtifactCorrupt, or ArtifactMismatch for another kind.
        """
        return cls.parse(_read_published(path, kind or cls.of_kind, cls.instead)[0], path / MANIFEST)

    @classmethod
    def read_file(cls, path: Path) -> Self:
        """Return the manifest in a file, the errors are those of ``read_sealed``."""
        data = read_bytes(path)
        _check_seal(data, path)
        return cls.parse(data, path)

    @classmethod
    def parse(cls, data: bytes, path: Path) -> Self:
        """Return the manifest in the bytes of a file; warn of keys that this version does not know."""
        if cls is Manifest:
            return super().parse(data, path)
        try:
            return cls.model_validate_json(data, extra="forbid")
        except ValidationError as error:
            found = [problem for problem in error.errors(include_url=False) if problem["type"] in _UNKNOWN_KEY]
        manifest = super().parse(data, path)
        _report_unknown(path, tuple(".".join(map(str, problem["loc"])) for problem in found))
        return manifest


def published_file(root: Path, manifest: Manifest, name: str, *, whole: bool = False) -> Path:
    """Return the path of a file that the manifest of the artifact at ``root`` lists, if it is as it was published.

    Its size is compared; its checksum too if it has at most ``SMALL`` bytes, or if it will be read ``whole``. Raises
    ArtifactCorrupt.
    """
    recorded = manifest.files.get(name)
    path = inside(root, name)
    if recorded is None:
        raise ArtifactCorrupt(f"{path}: is no file of the artifact; it has {', '.join(sorted(manifest.files))}")
    if problems := check_files(root, {name: recorded}, largest=None if whole else SMALL):
        raise ArtifactCorrupt(f"{problems[0]}; restore the file, or delete the artifact and make it again")
    return path


SMALL = 16 << 20
"""Bytes up to which a file is compared with its checksum whenever it is opened: some milliseconds. `pipeline verify`
compares all."""


class Reference(Record):
    """A transcoder or tables that an artifact was made from."""

    digest: str
    layer: int | None = None
    """Which of a cross-layer transcoder's layers, from 0."""


class CacheReference(Record):
    """A generation of a cache that an artifact was made from."""

    cache_id: str
    generation: int
    digest: str


class Inputs(Record):
    """What an artifact was made from."""

    cache: CacheReference | None = None
    live: dict[str, JSON] | None = None
    """What decides the rows, where the model ran for them."""
    text: dict[str, JSON] | None = None
    """Identity of the fresh text that was read."""
    rows: dict[str, JSON] | None = None
    """Which rows of a cache were read, if not all."""
    imported: dict[str, str] | None = None
    """Checksums of another tool's files."""
    transcoder: Reference | None = None
    transcoders: dict[str, Reference] | None = None
    """By site."""
    downstream: dict[str, Reference] | None = None
    """By site, those whose features were looked for connections to."""
    tables: Reference | dict[str, Reference] | None = None
    """One, or by site."""
    prompts: Reference | None = None
    labels: dict[str, str] | None = None
    """Digests of the labels of tables that had some, by site or folder."""
    matches: list[str] | None = None
    """Checksums of files about the similar features of two tables."""


class _ModelRecord(Record):
    name: str
    n_layers: Annotated[int, Field(ge=0, le=100_000)] = 0


ModelIdentity = Annotated[dict[str, JSON], shaped(_ModelRecord)]
"""Identity of a language model."""


class DerivedManifest(Manifest):
    """The manifest of what is made with a language model, be it from a cache, transcoders or tables."""

    format: int = 1
    inputs: Inputs
    model: ModelIdentity
    versions: dict[str, str] = Field(default_factory=dict)
    """Of the libraries that had a say in it."""


_UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")
"""Pydantic's names for a key that a class, or a dataclass, does not have."""


@cache
def _report_unknown(path: Path, keys: tuple[str, ...]) -> None:
    """Warn, once for a file, of keys that a newer version must have written."""
    logger.warning("%s: has keys that this version does not know, and keeps: %s", path, ", ".join(keys))


def seal(manifest: Mapping[str, JSON]) -> bytes:
    """Return the bytes of a manifest with its own digest inside, so that a changed byte shows."""
    return canonical_json({**manifest, "digest": digest(dict(manifest))})


def read_sealed(path: Path) -> dict[str, JSON]:
    """Read a sealed manifest; raise ArtifactCorrupt if its content differs from its digest.

    Raises ArtifactMismatch for a format that a newer version wrote.
    """
    return _check_seal(read_bytes(path), path)


def read_own(path: Path) -> dict[str, JSON]:
    """Return what ``seal`` gave a file that is no manifest; raise ArtifactCorrupt if it has changed since.

    Release 0.1 wrote such files without a digest, and these are taken as they are.
    """
    data = read_bytes(path)
    content = _parse_json(data, path)
    if not isinstance(content, dict):
        raise ArtifactCorrupt(f"{path}: is no JSON object; restore it")
    if content.pop("digest", None) is not None and seal(content) != data:
        raise ArtifactCorrupt(f"{path}: differs from its own digest; restore it")
    return content


def _check_seal(data: bytes, path: Path) -> dict[str, JSON]:
    manifest = _parse_json(data, path)
    if not isinstance(manifest, dict) or "digest" not in manifest:
        raise ArtifactCorrupt(f"{path}: is no manifest (it has no digest); {RESTORE}")
    content = {key: value for key, value in manifest.items() if key != "digest"}
    if seal(content) != data:
        raise ArtifactCorrupt(f"{path}: differs from its own digest; {RESTORE}")
    refuse_newer(path.parent, str(manifest.get("kind")), manifest)
    return manifest


def _read_published(path: Path, kind: str, instead: Mapping[str, str]) -> tuple[bytes, dict[str, JSON]]:
    """Return the bytes of a manifest, and what they say."""
    if not (path / MANIFEST).exists():
        refuse_lost(path / MANIFEST)
        if (path / REQUEST).exists():
            this, was, it, they = ("these", "were", "them", "they") if is_plural(kind) else ("this", "was", "it", "it")
            if is_being_written(path):
                raise ArtifactIncomplete(f"{path}: another process is writing {this} {kind}; wait until that is done")
            raise ArtifactIncomplete(
                f"{path}: {this} {kind} {was} never finished; run the command that makes {it} again and {they} will "
                "continue"
            )
        verb, it = ("are", "them") if is_plural(kind) else ("is", "it")
        raise ArtifactMissing(f"{path}: there {verb} no {kind} here; check the path, or make {it} first")
    data = read_bytes(path / MANIFEST)
    manifest = _check_seal(data, path / MANIFEST)
    if (actual := str(manifest.get("kind"))) != kind:
        way_on = instead.get(actual, f"give the path of {with_article(kind)}")
        raise ArtifactMismatch(f"{path}: holds {with_article(actual)}, wanted {with_article(kind)}; {way_on}")
    return data, manifest


def published_kind(path: Path) -> str | None:
    """Return the kind that the manifest in a folder names; None where nothing is published. Nothing else is checked."""
    manifest = read_json(path / MANIFEST) if (path / MANIFEST).is_file() else None
    kind = manifest.get("kind") if isinstance(manifest, dict) else None
    return kind if isinstance(kind, str) else None


Reads = Callable[[FileRecord], bool]
"""Whether a file with such a record is read, and not only its size compared."""


def verify_artifact(path: Path, kind: str, reads: Reads = lambda _: True) -> list[str]:
    """Re-read every file of a published artifact and return a sentence for each that differs from its record."""
    try:
        manifest = Manifest.read(path, kind)
    except ArtifactCorrupt as error:
        return [str(error)]
    own = check_request(path, manifest.request) + check_files(path, manifest.files, reads=reads)
    return own + check_members(path, manifest.as_json(), reads)


_MEMBERS = ("runs", "transcoders")
"""Keys under which manifests list the artifacts inside, each with ``path`` and ``digest``."""


def check_members(path: Path, manifest: Mapping[str, JSON], reads: Reads = lambda _: True) -> list[str]:
    """Verify the artifacts inside one, and that they are those it was published with."""
    problems = []
    listed = [member for key in _MEMBERS if isinstance(manifest.get(key), list) for member in manifest[key]]
    for member in listed:
        if not isinstance(member, dict) or not {"path", "digest"} <= member.keys():
            problems.append(
                f"{path / MANIFEST}: lists {shown(member)} as an artifact inside; wanted its path and digest"
            )
            continue
        if member["digest"] is None:  # a run that diverged
            continue
        try:
            folder = inside(path, f"{member['path']}/{MANIFEST}").parent
            found = Manifest.read_file(folder / MANIFEST)
        except ArtifactCorrupt as error:
            problems.append(str(error))
            continue
        if found.digest != member["digest"]:
            problems.append(f"{folder}: is not the {found.kind} that {path} was published with")
        problems += verify_artifact(folder, found.kind, reads)
    return problems


def check_request(path: Path, recorded: Mapping[str, JSON]) -> list[str]:
    """Compare ``request.json`` with the request that a manifest records; return the difference."""
    request = path / REQUEST
    try:
        is_same = request.exists() and read_bytes(request) == canonical_json(recorded)
    except OSError as error:
        return [str(unreadable(error, request))]
    except ArtifactCorrupt as error:
        return [str(error)]
    return [] if is_same else [f"{request}: differs from the request in the manifest"]


def check_files(
    path: Path, files: Mapping[str, FileRecord], *, largest: int | None = None, reads: Reads = lambda _: True
) -> list[str]:
    """Compare files under ``path`` with their recorded ``bytes`` and ``checksum``; return the differences.

    Of files larger than ``largest`` bytes, if it is given, and of those that are not to be read, only the size is
    compared. A name that leads out of ``path`` is a difference too; its file is not read.
    """
    problems = []
    for name, recorded in sorted(files.items()):
        try:
            file = inside(path, name)
        except ArtifactCorrupt as error:
            problems.append(str(error))
            continue
        try:
            if not file.exists():
                problems.append(f"{file}: is missing")
            elif (n_bytes := file.stat().st_size) != recorded.bytes:
                problems.append(f"{file}: has {n_bytes} bytes, its record says {recorded.bytes}")
            elif (largest is not None and n_bytes > largest) or not reads(recorded):
                continue
            elif (checksum := checksum_file(file)) != recorded.checksum:
                problems.append(f"{file}: checksum is {checksum}, its record says {recorded.checksum}")
        except OSError as error:  # a bad sector: the other files are checked all the same
            problems.append(str(unreadable(error, file)))
    return problems


def describe_files(path: Path, names: Iterable[str]) -> dict[str, dict[str, JSON]]:
    """Return ``{name: {bytes, checksum}}`` of files under ``path``. Raises ArtifactCorrupt for names outside."""
    files = {name: inside(path, name) for name in sorted(names)}
    return {name: {"bytes": file.stat().st_size, "checksum": checksum_file(file)} for name, file in files.items()}
