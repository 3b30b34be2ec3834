"""Pack the check of a GPU for a machine without a network: ``python -m benchmarks.gpu_check.pack --out FILE.tar.xz``.

The archive holds this checkout and the packages that the checks import, for another Python than this one if need be;
torch, NumPy and triton are that machine's own. There: ``tar xf FILE.tar.xz && python gpu-check --out results``.
numba and its compiler would be more than half of the archive: loops of the host run uncompiled there, and what they
cost is not measured.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

ROOT = Path(__file__).parents[2]
FOLDER = "gpu-check"
LIMIT_BYTES = 60 << 20
PRESET: Final = 2
"""Of xz: five times as fast as its default, a tenth larger."""
SOURCES = ("tailrace", "pipeline", "storage", "training", "analysis", "benchmarks/*.py", "benchmarks/gpu_check")
SUPPORT = ("tests/__init__.py", "tests/support", "tests/data", "pyproject.toml", "constraints.txt", "LICENSE")
PACKAGES = (
    *("annotated-types", "click", "donfig", "einops", "filelock", "fsspec", "google-crc32c", "jaxtyping", "numcodecs"),
    *("packaging", "pyarrow", "pydantic", "pydantic_core", "PyYAML", "safetensors", "tqdm", "typing-inspection"),
    *("typing_extensions", "wadler_lindig", "xxhash", "zarr"),
)
"""What every check imports, besides torch and what torch brings."""
MODEL_PACKAGES = (
    *("accelerate", "anyio", "datasets", "dill", "h11", "httpcore2", "httpx2", "huggingface_hub", "idna"),
    *("multiprocess", "pandas", "python-dateutil", "regex", "rich", "sniffio", "tokenizers", "transformer-lens"),
    *("transformers", "truststore"),
)
"""What the checks with a language model import besides."""
UNUSED = (
    *("*/tests/*", "*/test/*", "*/include/*", "*.pyx", "*.pxd", "*.pxi", "*.pyi", "*.a", "bin/*", "*/__pycache__/*"),
    *("pyarrow/libarrow_flight*", "pyarrow/libarrow_s3*", "pyarrow/_flight*"),
    *("pyarrow/_s3fs*", "pyarrow/_substrait*", "pyarrow/libarrow_python_flight*", "pyarrow/libarrow*[a-z].so"),
    *("pyarrow/*.so.[0-9]*.[0-9]*", "pyarrow/src/*"),
)
"""Files of the packages that no check opens; of pyarrow, what reaches other machines, and second copies."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="archive to write, .tar.xz")
    parser.add_argument("--python", default="3.12", help="Python there, such as 3.12")
    parser.add_argument("--machine", default="x86_64", help="processor there, such as aarch64")
    parser.add_argument("--without-models", action="store_true", help="leave out what only language models need")
    chosen = parser.parse_args()
    names = PACKAGES if chosen.without_models else (*PACKAGES, *MODEL_PACKAGES)
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / FOLDER
        install(pinned(names), home / "packages", chosen.python, chosen.machine)
        remove_unused(home / "packages")
        describe_project(home / "packages")
        copy_sources(home / "source")
        (home / "__main__.py").write_text(starter(chosen.python))
        with tarfile.open(chosen.out, "w:xz", preset=PRESET) as archive:
            archive.add(home, FOLDER)
        size = chosen.out.stat().st_size
        if size > LIMIT_BYTES:
            raise SystemExit(
                f"{chosen.out}: {size / 2**20:.1f} MiB, wanted at most {LIMIT_BYTES >> 20}; the largest folders: "
                f"{', '.join(largest(home / 'packages'))}; --without-models leaves half of them out"
            )
    print(f"{chosen.out}: {size / 2**20:.1f} MiB; there: tar xf {chosen.out.name} && python {FOLDER} --out results")


def pinned(names: Iterable[str]) -> list[str]:
    """Return the requirements of packages as constraints.txt pins them; raise SystemExit naming those it lacks."""
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, found, _ = line.partition("==")
        if found:
            pins[canonical(name)] = line
    missing = [name for name in names if canonical(name) not in pins]
    if missing:
        raise SystemExit(f"constraints.txt has no pin of {', '.join(missing)}; take them off the list of this module")
    return [pins[canonical(name)] for name in names]


def canonical(name: str) -> str:
    """Return a distribution's name in the spelling in which names are compared."""
    return name.lower().replace("_", "-").replace(".", "-")


def install(requirements: Sequence[str], target: Path, python: str, machine: str) -> None:
    """Install wheels for another Python into a folder, and nothing that they depend on."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-compile", "--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    for libc in ("2_28", "2_27", "2_24", "2_17"):
        command += ["--platform", f"manylinux_{libc}_{machine}"]
    command += ["--platform", f"manylinux2014_{machine}", "--target", str(target), *requirements]
    subprocess.run(command, check=True)


def remove_unused(packages: Path) -> None:
    """Delete files that no check opens."""
    for path in sorted(packages.rglob("*")):
        name = str(path.relative_to(packages))
        if path.is_file() and any(fnmatch(name, pattern) for pattern in UNUSED):
            path.unlink()


def describe_project(packages: Path) -> None:
    """Write what an installation would say of this project: its version, and the entry points that zarr looks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = packages / f"{project['name']}-{project['version']}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = (
        "\n".join([f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())])
        for group, entries in project["entry-points"].items()
    )
    (folder / "entry_points.txt").write_text("\n\n".join(groups) + "\n")


def copy_sources(target: Path) -> None:
    """Copy what git tracks of the code, links as links."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--", *SOURCES, *SUPPORT], cwd=ROOT, capture_output=True, check=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name, follow_symlinks=False)


def starter(python: str) -> str:
    """Return the program that runs the check with what lies beside it."""
    return f'''"""Run the check of a GPU: python {FOLDER} --out results; --help says more."""
import os
import sys

home = os.path.dirname(os.path.abspath(__file__))
if "%d.%d" % sys.version_info[:2] != {python!r}:
    sys.exit("this is packed for Python {python} and runs on %d.%d; pack it with --python" % sys.version_info[:2])
paths = [os.path.join(home, "source"), os.path.join(home, "packages"), os.environ.get("PYTHONPATH", "")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu_check", *sys.argv[1:]])
'''


def largest(packages: Path, n: int = 6) -> list[str]:
    """Return the largest folders with their sizes, uncompressed."""
    sizes = {
        folder.name: sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        for folder in packages.iterdir()
        if folder.is_dir()
    }
    names = sorted(sizes, key=lambda name: -sizes[name])[:n]
    return [f"{name} {sizes[name] / 2**20:.0f} MiB" for name in names]


if __name__ == "__main__":
    main()
