"""Local text: which files a path, a folder or a pattern means, what they are, and how ``datasets`` streams them.

Files are read in sorted order of their path below the folder they share, so a document's index does not depend on
the machine. A file is known by that relative path, its size and its checksum; where it lay is never recorded.
"""

from __future__ import annotations

import difflib
import glob
import io
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from tailrace.storage.artifact import checksum_file
from tailrace.storage.draft import holds_artifact
from tailrace.storage.errors import TextError
from tailrace.storage.names import files_below, home_path, matching
from tailrace.storage.parsing import is_broken

logger = logging.getLogger(__name__)

Format = Literal["text", "json", "parquet"]

FORMATS: dict[str, Format] = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")

_FOREIGN_FOLDERS = ("__MACOSX",)
"""What archivers put beside the files of an archive."""
_METADATA = re.compile(
    r"(readme|licen[sc]e|notice|changelog|citation|contributing)(\..*)?"
    r"|(dataset_infos?|dataset_dict|config|metadata|croissant|tokenizer|tokenizer_config|special_tokens_map|"
    r"generation_config|preprocessor_config|.*\.index)\.json(\..*)?",
    re.IGNORECASE,
)
"""Names of files that tell of a dataset, or of a model beside it, and hold no documents."""


class TextFiles(NamedTuple):
    """Local files of one format in reading order, and the name that each is recorded under."""

    format: Format
    paths: tuple[Path, ...]
    names: tuple[str, ...]


def looks_local(dataset: str) -> bool:
    """Tell a path or pattern from a hub name: it exists, is spelled like a path, or ends like a text file."""
    if os.path.exists(os.path.expanduser(dataset)) or dataset.startswith(("/", "./", "../", "~")):
        return True
    return glob.has_magic(dataset) or format_of(Path(dataset)) is not None


def format_of(path: Path) -> Format | None:
    """Return the format a file's name stands for, looking through one compression suffix; None if it is no text."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    if compressed:
        suffixes.pop()
    kind = FORMATS.get(suffixes[-1]) if suffixes else None
    return None if compressed and kind == "parquet" else kind


def find_text_files(dataset: str) -> TextFiles:
    """Return the text files that ``dataset`` (a file, a folder searched at any depth, or a glob) stands for.

    Raises TextError if there is none, naming near matches, or if the files are of several formats.
    """
    matching = _matching_files(dataset)
    if saved := next((path for path in matching if _is_saved_dataset(path)), None):
        raise TextError(
            f"{dataset}: {saved.parent} is a folder of Dataset.save_to_disk, whose .json files describe the dataset "
            "and hold no text; write it with datasets.load_from_disk(folder).to_parquet(file), or to_json, and pass "
            "that file"
        )
    matching = _without_metadata(dataset, matching)
    formats: list[Format] = sorted({kind for path in matching if (kind := format_of(path)) is not None})
    if not formats:
        raise TextError(_no_text_file(dataset, matching))
    if len(formats) > 1:
        examples = ", ".join(next(str(path) for path in matching if format_of(path) == kind) for kind in formats)
        raise TextError(f"{dataset}: holds files of several formats ({examples}); name one with a pattern like '*.txt'")
    chosen = [path for path in matching if format_of(path) is not None]
    if odd := next((path for path in chosen if is_broken(str(path))), None):
        raise TextError(
            f"{dataset}: holds {odd.name!r}, a name that is not UTF-8 and cannot be recorded; rename the file"
        )
    if not os.path.isdir(os.path.expanduser(dataset)) and len(chosen) < len(matching):
        other = next(path for path in matching if format_of(path) is None)
        raise TextError(f"{dataset}: matches {other}, which is no text file; {_wanted_suffixes()}")
    root = Path(os.path.commonpath([path.parent for path in chosen]))
    named = sorted((path.relative_to(root).as_posix(), path) for path in chosen)
    return TextFiles(formats[0], tuple(path for _, path in named), tuple(name for name, _ in named))


def describe_text_files(files: TextFiles) -> list[dict[str, Any]]:
    """Return name, bytes and checksum of every file: the identity of local text. Reads every byte once."""
    return [
        {"name": name, "bytes": path.stat().st_size, "checksum": checksum_file(path)}
        for name, path in zip(files.names, files.paths, strict=True)
    ]


def load_text_files(files: TextFiles, text_unit: str) -> Any:
    """Return the streaming dataset of ``files``; a file is one of its shards. Raises what ``datasets`` raises."""
    from datasets import load_dataset  # slow to import, and most commands read no text

    # Its readers log an error and then raise it: what the user is told would come after the same thing, twice.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    if any(path.suffix.lower() == ".zst" for path in files.paths):
        offer_zstandard()
    options: dict[Format, dict[str, Any]] = {
        "text": {"sample_by": text_unit, "encoding": "utf-8-sig"},  # editors of Windows write a byte order mark
        # Left alone, `datasets` takes the size of the first row group, and fails where that is empty.
        "parquet": {"batch_size": 1024},
    }
    # `datasets` reads each name as a pattern, so a bracket in a file name would match something else or nothing.
    patterns = [glob.escape(str(path)) for path in files.paths]
    return load_dataset(files.format, data_files=patterns, split="train", streaming=True, **options[files.format])


def offer_zstandard() -> None:
    """Let fsspec, through which ``datasets`` opens files, read zstandard with pyarrow where nothing else can.

    Otherwise .zst files would need one more package, and the reader that fsspec builds from it stops silently
    after the first frame of a file that was compressed in parallel.
    """
    from fsspec.compression import available_compressions, register_compression

    if "zstd" not in available_compressions():
        register_compression("zstd", _open_zstandard, "zst")


def _open_zstandard(file: IO[bytes], mode: str = "rb", **_: Any) -> IO[bytes]:
    if "r" not in mode:
        raise io.UnsupportedOperation("zstandard files are only read here")
    import pyarrow as pa  # not at the top: settings ask this module which text is local

    stream: IO[bytes] = pa.CompressedInputStream(file, "zstd")
    return stream


def _matching_files(dataset: str) -> list[Path]:
    expanded = os.path.expanduser(dataset)
    if os.path.isfile(expanded):
        return [Path(expanded).absolute()]
    if os.path.isdir(expanded):
        return sorted(_files_inside(Path(expanded).absolute()))
    named = Path(expanded).parts
    root = Path(expanded).anchor
    return sorted(
        path.absolute()
        for path in matching(Path(root), expanded.removeprefix(root))
        if path.is_file() and not any(part in _FOREIGN_FOLDERS and part not in named for part in path.parts)
    )


def _without_metadata(dataset: str, matching: list[Path]) -> list[Path]:
    """Return the files without those that only tell of a dataset by their names, unless there are no others."""
    metadata = [path for path in matching if format_of(path) is not None and _METADATA.fullmatch(path.name)]
    if not metadata or not any(format_of(path) is not None for path in matching if path not in metadata):
        return matching
    names = ", ".join(path.name for path in metadata[:3]) + (f" and {len(metadata) - 3} more" * (len(metadata) > 3))
    logger.warning(
        "%s: left out by their names, as no documents: %s; to read such a file, name it alone", dataset, names
    )
    return [path for path in matching if path not in metadata]


def _files_inside(folder: Path) -> Iterator[Path]:
    """Return the files below a folder, but for hidden ones and those of caches and other artifacts of ours.

    Raises TextError if the folder is such an artifact itself.
    """
    if holds_artifact(folder):
        raise TextError(f"{folder}: is an artifact of this package, whose files are no text; give a folder of text")
    inside = files_below(folder, but=_is_no_text)
    return (file for file in inside if not _is_hidden(file.name) and file.is_file())


def _is_no_text(folder: Path) -> bool:
    if is_ours := holds_artifact(folder):
        logger.warning("%s: left out, an artifact of this package", folder)
    return is_ours or _is_hidden(folder.name)


def _is_saved_dataset(path: Path) -> bool:
    return path.name == "dataset_info.json" and (path.parent / "state.json").is_file()


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _FOREIGN_FOLDERS


def _no_text_file(dataset: str, matching: list[Path]) -> str:
    if matching:
        example = f"{matching[0].name} and {len(matching) - 1} more" if len(matching) > 1 else matching[0].name
        return f"{dataset}: holds no text file (found {example}); {_wanted_suffixes()}"
    if glob.has_magic(dataset):
        return f"{dataset}: no file matches this pattern; check it, and quote it so that the shell leaves it alone"
    path = home_path(dataset)
    if path.is_dir():
        return f"{dataset}: is an empty folder; {_wanted_suffixes()}"
    if not path.parent.is_dir():
        return f"{dataset}: there is no folder {path.parent}; check the path"
    near = near_paths(dataset)
    hint = f"did you mean {' or '.join(near)}?" if near else "check the path"
    return f"{dataset}: no such file or folder; {hint}"


def near_paths(dataset: str) -> list[str]:
    """Return up to three files or folders that lie where ``dataset`` would and are spelled much like it."""
    path = home_path(dataset)
    if not path.parent.is_dir():
        return []
    near = difflib.get_close_matches(path.name, sorted(os.listdir(path.parent)), n=3, cutoff=0.6)
    return [str(path.parent / name) for name in near]


def _wanted_suffixes() -> str:
    return f"wanted {', '.join(FORMATS)}, also compressed ({', '.join(COMPRESSIONS)}; Parquet compresses itself)"
