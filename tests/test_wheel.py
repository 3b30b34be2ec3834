"""Installed from a wheel or in place, everything lies below one name, and a user's own files keep theirs.

Each install has an environment of its own. Its dependencies are links to the ones installed here, without this
checkout's own editable install, so nothing is downloaded and nothing but that install can provide our package.
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
FOLDERS = ("analysis", "pipeline", "storage", "training")


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command and return what it printed; its errors are shown if it fails."""
    neutral = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONSAFEPATH"}}
    done = subprocess.run(command, cwd=cwd, env=neutral, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, so that no stale ``build/`` gets in and the checkout stays as it is."""
    copied = tmp_path_factory.mktemp("source")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "tailrace", *FOLDERS, cwd=ROOT)
    for name in [*listed.splitlines(), "pyproject.toml", "setup.py", "LICENSE", "README.md"]:
        if (ROOT / name).exists():
            (copied / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copied / name, follow_symlinks=False)
    return copied


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out))
    run(sys.executable, "-m", "pip", "wheel", *options, str(source), cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel, and links to everything else installed here."""
    return make_environment(tmp_path_factory.mktemp("environment"), str(wheel))


@pytest.fixture(scope="module")
def editable(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment in which the copy of the checkout is installed in place."""
    return make_environment(tmp_path_factory.mktemp("editable"), "--no-build-isolation", "--editable", str(source))


def make_environment(root: Path, *what: str) -> Path:
    venv.create(root, with_pip=False, symlinks=True)
    links = root / "dependencies"
    links.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "tailrace" not in entry.name and entry.suffix != ".pth":
            (links / entry.name).symlink_to(entry)
    (site_packages(root) / "dependencies.pth").write_text(f"{links}\n")
    run(
        *(sys.executable, "-m", "pip", "--python", root / "bin" / "python"),
        *("install", "--quiet", "--no-deps", "--no-index", *what),
        cwd=root,
    )
    return root


def site_packages(environment: Path) -> Path:
    (found,) = environment.glob("lib/python*/site-packages")
    return found


@pytest.fixture
def own_files(tmp_path: Path) -> Path:
    """A researcher's directory: modules, and a package, that carry the names of our folders."""
    for folder in ("analysis", "pipeline", "storage"):
        (tmp_path / f"{folder}.py").write_text("mine = True\n")
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "__init__.py").write_text("mine = True\n")
    (tmp_path / "training" / "transcoder.py").write_text("mine = True\n")
    return tmp_path


def test_wheel_holds_every_tracked_file_of_the_folders_once_below_the_one_name(wheel: Path) -> None:
    tracked = run("git", "ls-files", *FOLDERS, cwd=ROOT).splitlines()
    wanted = sorted(f"tailrace/{name}" for name in tracked if (ROOT / name).is_file())
    held = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    own = [f"tailrace/{name}" for name in ("__init__.py", "__main__.py", "circuits.py", "py.typed")]
    assert sorted(held) == sorted([*own, *wanted])


@pytest.mark.parametrize("install", ["environment", "editable"])
def test_files_of_the_same_names_change_nothing_and_are_not_shadowed(
    install: str, own_files: Path, request: pytest.FixtureRequest
) -> None:
    environment = request.getfixturevalue(install)
    program = (
        "import analysis, pipeline, storage, training.transcoder\n"
        "assert all(module.mine for module in (analysis, pipeline, storage, training, training.transcoder))\n"
        "import sys, tailrace.storage.artifact, tailrace.training.rows.batches\n"
        "files = [module.__file__ for name, module in sys.modules.items() if name.startswith('tailrace') "
        "and getattr(module, '__file__', None)]\n"
        "import os; assert len({os.path.realpath(file) for file in files}) == len(files), 'a module was loaded twice'\n"
        "print(tailrace.storage.artifact.checksum_file.__module__)"
    )
    assert run(environment / "bin" / "python", "-c", program, cwd=own_files) == "tailrace.storage.artifact\n"


@pytest.mark.parametrize("install", ["environment", "editable"])
@pytest.mark.parametrize("command", [("bin/pipeline",), ("bin/tailrace",), ("bin/python", "-m", "tailrace")])
def test_the_command_works_beside_such_files_by_each_of_its_names(
    install: str, command: tuple[str, ...], own_files: Path, request: pytest.FixtureRequest
) -> None:
    environment = request.getfixturevalue(install)
    printed = run(environment / command[0], *command[1:], "--help", cwd=own_files)
    assert printed.startswith("Usage: pipeline")


@pytest.mark.parametrize("install", ["environment", "editable"])
def test_the_folders_have_no_names_of_their_own(install: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    program = f"import importlib.util as u; print([u.find_spec(name) for name in {FOLDERS}])"
    environment = request.getfixturevalue(install)
    assert run(environment / "bin" / "python", "-c", program, cwd=tmp_path) == f"{[None] * 4}\n"


def test_a_folder_on_the_path_is_refused_with_the_name_to_import() -> None:
    done = subprocess.run([sys.executable, "-c", "import storage"], cwd=ROOT, capture_output=True, text=True)
    assert "ImportError: import tailrace.storage: this folder has no import name of its own" in done.stderr


def test_a_copy_that_lost_its_links_says_so(source: Path, tmp_path: Path) -> None:
    """Some archives and file systems turn a link into a small file that holds its target's name."""
    shutil.copytree(source / "tailrace", tmp_path / "tailrace", symlinks=True)
    for folder in FOLDERS:
        (tmp_path / "tailrace" / folder).unlink()
        (tmp_path / "tailrace" / folder).write_text(f"../{folder}")
    done = subprocess.run([sys.executable, "-S", "-c", "import tailrace"], cwd=tmp_path, capture_output=True, text=True)
    assert "this copy of the repository lost its links; clone it with git" in done.stderr


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


NEVER_IMPORTED = "import sys, zarr; assert not any(name.split('.')[0] == 'tailrace' for name in sys.modules)\n"


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
