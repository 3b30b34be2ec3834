"""The built wheel works outside the checkout: its names are its own, and files beside the user cannot replace them.

The wheel is installed in an environment of its own. Its dependencies are links to the ones installed here, without
this checkout's own editable install, so nothing is downloaded and nothing but the wheel can provide our packages.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("analysis", "pipeline", "storage", "training")


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command and return what it printed; its errors are shown if it fails."""
    neutral = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONSAFEPATH"}}
    done = subprocess.run(command, cwd=cwd, env=neutral, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build from a copy, so that no stale ``build/`` gets in and the checkout stays as it is."""
    source = tmp_path_factory.mktemp("source")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", *PACKAGES, cwd=ROOT)
    names = [*listed.splitlines(), "pyproject.toml", "LICENSE", "README.md"]
    for name in names:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out))
    run(sys.executable, "-m", "pip", "wheel", *options, str(source), cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel, and links to everything else installed here."""
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, with_pip=False, symlinks=True)
    run(
        *(sys.executable, "-m", "pip", "--python", root / "bin" / "python"),
        *("install", "--quiet", "--no-deps", "--no-index", wheel),
        cwd=root,
    )
    links = root / "dependencies"
    links.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "tailrace" not in entry.name and entry.suffix != ".pth":
            (links / entry.name).symlink_to(entry)
    (site_packages(root) / "dependencies.pth").write_text(f"{links}\n")
    return root


def site_packages(environment: Path) -> Path:
    (found,) = environment.glob("lib/python*/site-packages")
    return found


@pytest.fixture
def hostile_directory(tmp_path: Path) -> Path:
    """A user's directory with files that carry our packages' names and must never be imported."""
    for package in PACKAGES:
        (tmp_path / f"{package}.py").write_text(f"raise SystemExit('{package}.py beside the user was imported')\n")
    return tmp_path


def test_wheel_holds_every_tracked_file_of_the_packages(wheel: Path) -> None:
    tracked = run("git", "ls-files", *PACKAGES, cwd=ROOT).splitlines()
    missing = {name for name in tracked if (ROOT / name).is_file()} - set(zipfile.ZipFile(wheel).namelist())
    assert missing == set()


def test_wheel_holds_only_the_four_packages(wheel: Path) -> None:
    top_level = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in top_level if not name.endswith(".dist-info")} == set(PACKAGES)


def test_packages_import_from_the_wheel(environment: Path, tmp_path: Path) -> None:
    program = (
        f"import importlib, json; print(json.dumps([importlib.import_module(name).__file__ for name in {PACKAGES}]))"
    )
    files = json.loads(run(environment / "bin" / "python", "-c", program, cwd=tmp_path))
    assert files == [str(site_packages(environment) / package / "__init__.py") for package in PACKAGES]


def test_no_other_distribution_provides_our_package_names(environment: Path, tmp_path: Path) -> None:
    program = "import importlib.metadata, json; print(json.dumps(importlib.metadata.packages_distributions()))"
    providers = json.loads(run(environment / "bin" / "python", "-c", program, cwd=tmp_path))
    assert {package: providers[package] for package in PACKAGES} == {package: ["tailrace"] for package in PACKAGES}


def test_our_package_names_are_not_of_the_standard_library() -> None:
    assert set(PACKAGES) & set(sys.stdlib_module_names) == set()


def test_command_ignores_files_with_our_names_beside_the_user(environment: Path, hostile_directory: Path) -> None:
    printed = run(environment / "bin" / "pipeline", "--help", cwd=hostile_directory)
    assert printed.startswith("Usage: pipeline")


def test_safe_path_ignores_files_with_our_names_beside_the_user(environment: Path, hostile_directory: Path) -> None:
    program = f"import {', '.join(PACKAGES)}; print('ours')"
    assert run(environment / "bin" / "python", "-P", "-c", program, cwd=hostile_directory) == "ours\n"


def test_without_safe_path_a_file_beside_the_user_wins(environment: Path, hostile_directory: Path) -> None:
    """Python's rule for ``python -c`` and ``-m``, which no package can change; it shows that the files are hostile."""
    command: list[str | Path] = [environment / "bin" / "python", "-c", "import storage"]
    done = subprocess.run(command, cwd=hostile_directory, capture_output=True, text=True)
    assert "storage.py beside the user was imported" in done.stderr


BITS = [0x3F80, 0x4000, 0xBF80, 0x0000]
"""1, 2, -1 and 0 as bfloat16."""


@pytest.fixture
def bfloat16_group(tmp_path: Path) -> Path:
    """A Zarr v3 group with an array ``values``, written by hand from the specification and not with our code."""
    array = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [4],
        "data_type": "bfloat16",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    }
    (tmp_path / "group" / "values" / "c").mkdir(parents=True)
    (tmp_path / "group" / "zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "group"}))
    (tmp_path / "group" / "values" / "zarr.json").write_text(json.dumps(array))
    (tmp_path / "group" / "values" / "c" / "0").write_bytes(np.array(BITS, "<u2").tobytes())
    return tmp_path


NEVER_IMPORTED = "import sys, zarr; assert not any(name.split('.')[0] == 'storage' for name in sys.modules)\n"


@pytest.mark.parametrize("opened", ["zarr.open_group('group', mode='r')", "zarr.open('group', mode='r')"])
def test_zarr_alone_opens_bfloat16_in_a_group(environment: Path, bfloat16_group: Path, opened: str) -> None:
    program = NEVER_IMPORTED + f"print({opened}['values'][:].tolist())"
    assert json.loads(run(environment / "bin" / "python", "-P", "-c", program, cwd=bfloat16_group)) == BITS


def test_zarr_opens_a_lone_bfloat16_array_once_the_installed_data_types_are_loaded(
    environment: Path, bfloat16_group: Path
) -> None:
    program = NEVER_IMPORTED + (
        "from importlib.metadata import entry_points\n"
        "for entry_point in entry_points(group='zarr.data_type'): entry_point.load()\n"
        "print(zarr.open_array('group/values', mode='r')[:].tolist())\n"
    )
    assert json.loads(run(environment / "bin" / "python", "-P", "-c", program, cwd=bfloat16_group)) == BITS
