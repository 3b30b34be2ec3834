"""What lies in folders is found as a shell finds it, and a folder that cannot be listed is an error, never empty."""

from __future__ import annotations

import errno
import glob
import os
from pathlib import Path
from typing import Any

import pytest

from tailrace.storage.names import files_below, matching

FILES = (
    "a.json",
    "b.txt",
    ".hidden.json",
    "in/a.json",
    "in/deep/c.json",
    "in/deep/.d.json",
    ".h/a.json",
    "x[1]/a.json",
)
PATTERNS = (
    "*.json", ".*.json", "*", "*/a.json", "*/*.json", "**/*.json", "in/**", "in/**/*.json", "in/*/c.json", "**",
    "[ab].*", "[!a].*", "x[[]1]/*", "in/deep", "none/*.json", "a.json/*", "in/../a.json", "?.json",
)  # fmt: skip


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "link").symlink_to("in")
    (tmp_path / "dangling").symlink_to("nowhere")
    return tmp_path


@pytest.fixture
def refused(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the system does not list: a test may be run by root, whom rights do not stop."""
    scandir = os.scandir

    def refuse(path: Any = ".") -> Any:
        if Path(path).name == "deep":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    return tree


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_name_what_a_shell_finds(tree: Path, pattern: str) -> None:
    shell = {Path(name) for name in glob.glob(str(Path(glob.escape(str(tree)), pattern)), recursive=True)}
    if pattern.endswith("**"):  # the folder itself is nothing below it
        shell.discard((tree / pattern).parent)
    assert matching(tree, pattern) == sorted(shell)


def test_a_link_to_a_folder_around_it_is_not_followed_for_ever(tree: Path) -> None:
    (tree / "in/up").symlink_to(tree)
    (tree / "itself").symlink_to("itself")
    assert matching(tree, "*/b.txt") == []
    found = matching(tree, "**/c.json")
    assert found == [tree / "in/deep/c.json", tree / "link/deep/c.json"]


def test_files_below_are_all_names_but_folders(tree: Path) -> None:
    names = sorted(path.relative_to(tree).as_posix() for path in files_below(tree))
    assert names == sorted((*FILES, "link", "dangling"))
    shown = files_below(tree, but=lambda folder: folder.name.startswith("."))
    assert sorted(path.relative_to(tree).as_posix() for path in shown) == sorted({*names} - {".h/a.json"})
    assert [*files_below(tree / "none")] == []


@pytest.mark.parametrize("pattern", ["in/*/*.json", "**/*.json", "in/deep/*", "in/deep/*.txt"])
def test_a_folder_that_cannot_be_listed_is_no_empty_one(refused: Path, pattern: str) -> None:
    with pytest.raises(PermissionError):
        matching(refused, pattern)
    with pytest.raises(PermissionError):
        list(files_below(refused))
    assert matching(refused, "in/*.json") == [refused / "in/a.json"]  # which does not ask
