"""What the README and the example files say can be typed, can be typed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from tailrace.pipeline.cache import stage as cache
from tailrace.pipeline.cache.settings import CacheSettings
from tailrace.pipeline.cli import COMMANDS, cli
from tailrace.pipeline.samples.bundled_models import bundled_model
from tailrace.pipeline.train import stage as train
from tailrace.training.loop.settings import TrainSettings
from tests.support.paths import SPEECHES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    """Return every `pipeline …` line of the README's shell blocks, continuation lines joined."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("pipeline ")]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small version of what `make demo` leaves behind."""
    folder = tmp_path_factory.mktemp("readme")
    place = folder / "demo" / "tiny-layer2"
    settings = CacheSettings(
        model=str(bundled_model("tiny-lm")), dataset=str(SPEECHES), layers="2", tokens=6000, holdout="1"
    )
    cache.run(settings, output=place / "cache", quiet=True)
    training = TrainSettings.model_validate(
        {"architecture": {"kind": "topk", "k": 8}, "d_sae": 64, "steps": 5, "batch_rows": 512}
    )
    train.run(training, cache=place / "cache", output=place / "transcoder", quiet=True)
    return folder


def test_every_python_block_runs_in_order(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo)
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(block, names)
    stream_position = names["position"]
    assert (stream_position.epoch, stream_position.step) == (1, 0)  # type: ignore[attr-defined]
    assert names["mlp_out"].shape[1] == 128  # type: ignore[attr-defined]
    assert (demo / "demo" / "tiny-layer2" / "small-tables" / "features.parquet").exists()


@pytest.mark.parametrize("line", commands())
def test_every_command_line_is_understood(line: str) -> None:
    name, *arguments = shlex.split(line)[1:]
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    command.make_context(name, arguments)  # raises a usage error for an unknown flag or value


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"make ([a-z-]+)", "\n".join(blocks("bash")))
    assert targets
    assert [
        target for target in targets if not re.search(rf"^[a-z -]*\b{target}\b[a-z -]*:", makefile, re.MULTILINE)
    ] == []


def test_every_command_is_in_the_readme_and_every_link_leads_somewhere() -> None:
    assert [name for name in COMMANDS if f"pipeline {name}" not in README and f"make {name}" not in README] == []
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []


def test_example_files_are_valid_settings() -> None:
    examples = ROOT / "docs" / "examples"
    cached = CacheSettings.read_file(examples / "gpt2-layer8-cache.yaml")
    trained = TrainSettings.read_file(examples / "gpt2-layer8-train.yaml")
    assert (cached.tokens, trained.rows, trained.architecture.kind) == (60_000_000, 60_000_000, "relu")
