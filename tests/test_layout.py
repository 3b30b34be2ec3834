"""The repository keeps what its documents promise: sizes of files, docstrings, folder map, pins, no machine's paths."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.house import crumbs, modules

ROOT = Path(__file__).parent.parent
PACKAGES = ("pipeline", "analysis", "training", "storage")
MODULES = sorted(module for package in PACKAGES for module in (ROOT / package).rglob("*.py"))
MAX_LINES = 600

CRUMBS: list[str] = []
"""Modules under 60 lines with one importer, plug-ins and commands aside. Only ever shorten this list."""

# Put together from pieces, so that this file does not hold what it forbids.
MACHINE_PATHS = re.compile(
    r"(?<![\w.~-])/(?:"
    + "|".join(("work", "farm", "root", "home", "Users", r"tmp/brief", r"opt/pypi"))
    + r")/?(?![\w-])"
)


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def requirements() -> dict[str, Requirement]:
    """Return every third-party distribution named in pyproject.toml, in an extra or not."""
    extras = project()["optional-dependencies"].values()
    named = [Requirement(line) for lines in (project()["dependencies"], *extras) for line in lines]
    return {canonicalize_name(requirement.name): requirement for requirement in named if requirement.name != "tailrace"}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def test_every_module_fits_the_line_budget() -> None:
    lengths = {str(module.relative_to(ROOT)): len(module.read_text().splitlines()) for module in MODULES}
    too_long = {name: length for name, length in lengths.items() if length > MAX_LINES}
    assert too_long == {}, f"modules past {MAX_LINES} lines; split them where their subject changes"


def test_no_module_is_a_crumb() -> None:
    found = crumbs(modules())
    assert sorted(set(found) - set(CRUMBS)) == [], "crumbs: fold each into the one module that imports it"
    assert sorted(set(CRUMBS) - set(found)) == [], "no crumbs any more: take them off the list"


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        str(module.relative_to(ROOT)) for module in MODULES if not ast.get_docstring(ast.parse(module.read_text()))
    ]
    assert silent == []


def folder_map() -> list[str]:
    """Return the folders of docs/contributing.md's map: lines ``folder/  what is in it`` under its heading."""
    block = re.search(
        r"^#+ [^\n]*folder map[^\n]*\n.*?^```[^\n]*\n(.*?)^```",
        (ROOT / "docs" / "contributing.md").read_text(),
        re.I | re.M | re.S,
    )
    assert block is not None, "docs/contributing.md has no heading with 'Folder map' and a fenced block after it"
    return re.findall(r"^([\w./-]+)/(?:\s|$)", block[1], re.M)


def test_the_folder_map_is_the_tree() -> None:
    mapped = folder_map()
    top_level = {path.relative_to(ROOT).parts[0] for path in tracked_files() if path.parent != ROOT}
    visible = {name for name in top_level if not name.startswith(".")}
    assert visible - set(mapped) == set(), "folders missing from the map"
    assert [name for name in mapped if not (ROOT / name).is_dir()] == [], "folders in the map that do not exist"


def test_no_file_names_a_path_of_a_machine() -> None:
    found = []
    for path in tracked_files():
        content = path.read_bytes()
        if b"\0" in content:
            continue
        for number, line in enumerate(content.decode(errors="replace").splitlines(), start=1):
            if match := MACHINE_PATHS.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]}")
    assert found == []


@pytest.mark.parametrize(
    "text", ["see /" + "work/main", "cache_dir: /" + "home/someone/caches", '"/' + "root/.cache" + '"']
)
def test_a_path_of_a_machine_would_be_found(text: str) -> None:
    assert MACHINE_PATHS.search(text)


@pytest.mark.parametrize(
    "text", ["how it works/what", "./work/main", "a homework/", "framework/home", "caches/gpt2-l8"]
)
def test_other_slashes_are_no_path_of_a_machine(text: str) -> None:
    assert not MACHINE_PATHS.search(text)


def test_changelog_has_this_version_or_unreleased_changes() -> None:
    headings = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings, "CHANGELOG.md has no `## [version]` heading"
    assert headings[0] in {"Unreleased", project()["version"]}


def notes(version: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--silent", "notes", f"VERSION={version}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_release_notes_are_the_section_of_the_version_and_no_other() -> None:
    sections = re.split(r"^## \[([^\]]+)\].*$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)[1:]
    assert sections
    for version, section in zip(sections[::2], sections[1::2], strict=True):
        assert notes(version).stdout.strip() == section.strip()


@pytest.mark.parametrize("version", ["0.0.0", "", "Unreleas"])
def test_a_version_without_release_notes_is_an_error(version: str) -> None:
    refused = notes(version)
    assert refused.returncode != 0
    assert f"CHANGELOG.md has no notes under {version}" in refused.stderr


def workflow_commands() -> dict[str, list[str]]:
    """Return the commands of every workflow of GitHub, by its file."""
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    jobs = {file.name: yaml.safe_load(file.read_text())["jobs"].values() for file in files}
    return {name: [step["run"] for job in of for step in job["steps"] if "run" in step] for name, of in jobs.items()}


def test_workflows_run_targets_that_the_makefile_has() -> None:
    targets = set(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.M))
    commands = workflow_commands()
    used = {name: re.findall(r"\bmake (?:--\w+ )*([\w-]+)", "\n".join(runs)) for name, runs in commands.items()}
    assert {name for name, made in used.items() if not made} == set(), "workflows that build nothing"
    assert {name: sorted(set(made) - targets) for name, made in used.items() if set(made) - targets} == {}


def test_issue_forms_ask_for_versions_by_a_command_there_is() -> None:
    forms = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")}
    fields = {field["id"]: field["attributes"] for field in forms["bug.yml"]["body"]}
    assert "pipeline --version" in fields["versions"]["description"]
    assert forms["config.yml"].keys() <= {"blank_issues_enabled", "contact_links"}


def test_every_requirement_is_pinned_within_its_bounds() -> None:
    pinned = pins()
    assert sorted(requirements().keys() - pinned.keys()) == []
    outside = {name: pinned[name] for name, wanted in requirements().items() if pinned[name] not in wanted.specifier}
    assert outside == {}


def test_a_folder_that_cannot_be_listed_is_never_taken_for_an_empty_one() -> None:
    silent = re.compile(r"\.r?glob\(|\bos\.walk\(")  # `storage/names.py` has what raises
    found = [
        f"{module.relative_to(ROOT)}:{number}"
        for module in MODULES
        for number, line in enumerate(module.read_text().splitlines(), 1)
        if silent.search(line) and "onerror=" not in line
    ]
    assert found == [], "use `matching` or `files_below` of storage/names.py"


def imported_names(module: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def test_every_import_is_of_a_declared_requirement() -> None:
    providers = packages_distributions()
    extras = project()["optional-dependencies"]
    lines = project()["dependencies"] + [
        line for name in ("gpu", "smollm2", "tensorboard", "wandb") for line in extras[name]
    ]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    undeclared = set()
    for module in MODULES:
        for name in set(imported_names(module)) - {"tailrace"} - set(sys.stdlib_module_names):
            if not declared & {canonicalize_name(provider) for provider in providers.get(name, [])}:
                undeclared.add(f"{module.relative_to(ROOT)} imports {name}")
    assert sorted(undeclared) == []


def test_a_public_class_name_means_one_thing() -> None:
    holders: dict[str, list[str]] = {}
    for folder in ("pipeline", "analysis", "training", "storage"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    holders.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in holders.items() if len(paths) > 1} == {}
