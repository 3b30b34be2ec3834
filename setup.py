"""The wheel is built from the four folders, each below the one import name; all else is in ``pyproject.toml``."""

from setuptools import find_namespace_packages, setup

FOLDERS = ("pipeline", "storage", "training", "analysis")

found = find_namespace_packages(
    include=[pattern for folder in FOLDERS for pattern in (folder, f"{folder}.*")], exclude=["*__pycache__*"]
)
setup(
    packages=["tailrace", *(f"tailrace.{name}" for name in found)],
    package_dir={"tailrace": "tailrace", **{f"tailrace.{folder}": folder for folder in FOLDERS}},
)
