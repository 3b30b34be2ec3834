"""Manifests: of another shape they are refused with every key, and what a newer version wrote is kept and reported."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tailrace.storage.activation_cache import open_cache
from tailrace.storage.artifact import MANIFEST, read_json, seal
from tailrace.storage.cache_format import CacheManifest, Site, UnitRecord, manifest_name
from tailrace.storage.errors import ArtifactCorrupt
from tests.support.synthetic_cache import extend_in_steps, write_synthetic_cache


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Change the manifest of a cache's first generation and seal it again; return what it says now."""
    content = read_json(path / MANIFEST)
    del content["digest"]
    change(content)
    for name in (MANIFEST, manifest_name(0)):
        (path / name).write_bytes(seal(content))
    return dict(read_json(path / MANIFEST))


def as_newer(content: dict[str, Any]) -> None:
    """Add keys as a newer version may, at every depth."""
    content["licence"] = {"name": "CC0"}
    content["splits"]["train"]["shortest"] = 3
    content["format"]["tilt"] = [1.5, None]
    content["format"]["sites"][0]["colour"] = "red"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    write_synthetic_cache(tmp_path / "cache", n_contexts=8, n_heldout_contexts=0)
    return tmp_path / "cache"


def test_keys_of_a_newer_version_are_kept_and_reported_once(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    written = rewrite(cache, as_newer)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert open_cache(cache).manifest.as_json() == written
    (message,) = caplog.messages
    assert message.startswith(f"{cache / MANIFEST}: has keys that this version does not know, and keeps: ")
    named = set(message.rpartition(": ")[2].split(", "))
    assert named == {"licence", "splits.train.shortest", "format.tilt", "format.sites.0.colour"}


def test_a_manifest_of_this_version_has_no_key_that_is_not_known(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert open_cache(cache).manifest.as_json() == read_json(cache / MANIFEST)
    assert caplog.messages == []


def test_a_cache_that_an_older_version_extends_keeps_them(cache: Path) -> None:
    rewrite(cache, as_newer)
    assert list(extend_in_steps(cache, n_contexts=16))[-1] == "published"
    newest = read_json(cache / MANIFEST)
    assert newest["generation"] == 1
    assert newest["licence"] == {"name": "CC0"}
    assert newest["format"]["tilt"] == [1.5, None]
    assert newest["format"]["sites"][0]["colour"] == "red"


def test_a_manifest_of_another_shape_is_refused_with_every_key(cache: Path) -> None:
    def spoil(content: dict[str, Any]) -> None:
        del content["seed"]
        content["generation"] = "0"
        content["splits"]["train"]["n_rows"] = 1.5
        content["format"]["sites"][0]["d_in"] = None
        content["metadata"] = ["x" * 1000]

    rewrite(cache, spoil)
    with pytest.raises(ArtifactCorrupt) as refused:
        open_cache(cache)
    head, *lines = str(refused.value).splitlines()
    assert head == f"{cache / MANIFEST}: is not as wanted; restore it, or delete the artifact and make it again:"
    wrong = {"seed", "generation", "splits.train.n_rows", "format.sites.0.d_in", "metadata"}
    assert {line.split(":")[0].strip() for line in lines} == wrong
    assert any("valid integer" in line and line.endswith("(got '0')") for line in lines)
    assert all(len(line) < 400 for line in lines)


def test_a_commit_record_of_another_shape_is_damage(cache: Path) -> None:
    split = open_cache(cache).split("train")
    name = open_cache(cache).manifest.splits["train"].unit_records[0][0]
    (cache / name).write_text("{}")
    with pytest.raises(ArtifactCorrupt, match=r"train-unit-000000.json: has 2 bytes, its record says"):
        split.first_contexts()
    with pytest.raises(ArtifactCorrupt, match="first_context: Field required"):
        UnitRecord.read_file(cache / name)
    (cache / name).write_text("{")
    with pytest.raises(ArtifactCorrupt, match=r"is not as wanted.*\n.*Invalid JSON"):
        UnitRecord.read_file(cache / name)


def test_a_site_is_equal_to_the_same_site_and_can_be_hashed(cache: Path) -> None:
    site = next(iter(open_cache(cache).sites.values()))
    again = Site(**site.as_json())
    assert again == site
    assert hash(again) == hash(site)
    assert site in CacheManifest.read(cache).format.sites
