"""One grammar for all commands: what a command is about stands by itself, and a noun is one flag everywhere."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml

from tailrace.pipeline import cli
from tailrace.pipeline.cache.settings import CacheSettings
from tailrace.pipeline.shared import run_options
from tailrace.pipeline.shared.options import read_settings
from tailrace.pipeline.shared.sections import ALIASES, SectionCommand, current_name
from tailrace.storage.errors import SettingsError
from tailrace.training.loop.settings import TrainSettings
from tests.support.cache_jobs import command
from tests.support.paths import ROOT

NOUNS = {"--cache", "--transcoders", "--tables", "--dashboard", "--out"}
"""Flags for artifacts. Each means one thing in all commands."""
OTHER_FOLDERS = {
    ("train", "--from"), ("analyze", "--downstream"), ("steer", "--from-circuit"),
    ("label", "--import"), ("rm", "--in"), ("prune", "--in"),
}  # fmt: skip
"""A second artifact of the kind that the command is about already, a circuit, which no other command reads, and folders
that are none of ours."""
WITHOUT_JSON = {"serve", "demo", "blind"}
"""A server, a tour, and studies whose ledger is the record."""
RELEASED = ROOT / "tests/released/d14043a"


def commands(group: click.Group = cli.cli, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        found = group.get_command(context, name)
        assert found is not None
        if isinstance(found, click.Group):
            yield from commands(found, (*path, name))
        else:
            yield " ".join((*path, name)), found


ALL = dict(commands())


def options(found: click.Command) -> list[click.Option]:
    return [one for one in found.params if isinstance(one, click.Option) and not one.hidden]


def test_an_artifact_beside_what_a_command_is_about_is_a_flag_named_by_its_noun() -> None:
    others = {
        (name, one.opts[0])
        for name, found in ALL.items()
        for one in options(found)
        if isinstance(one.type, run_options.HomePath) and one.type.dir_okay and one.opts[0] not in NOUNS
    }
    assert {(name, flag) for name, flag in others if flag != "--config"} == OTHER_FOLDERS


def test_no_flag_has_two_spellings_and_none_is_spelt_by_another_name() -> None:
    spelt = {name: [one.opts for one in options(found) if len(one.opts) > 1] for name, found in ALL.items()}
    assert {name: several for name, several in spelt.items() if several} == {}
    flags = {flag for found in ALL.values() for one in options(found) for flag in one.opts}
    other = {f"--{alias.replace('_', '-')}" for alias in ALIASES}
    # each of these has a flag of that name where its other meaning is not to be had
    assert flags & other == {"--rows", "--tokens", "--layer"}


def test_a_noun_may_be_repeated_in_every_command_or_in_none() -> None:
    repeated: defaultdict[str, set[bool]] = defaultdict(set)
    for found in ALL.values():
        for one in options(found):
            if one.opts[0] in NOUNS:
                repeated[one.opts[0]].add(one.multiple)
    repeated["--tables"].discard(False)  # of `blind study begin`, which is about a single feature
    once, often = {False}, {True}
    assert repeated == {"--cache": once, "--dashboard": once, "--out": once, "--transcoders": often, "--tables": often}


def test_tokens_is_how_much_text_is_cached_or_written_and_rows_how_much_is_read_of_it() -> None:
    flags = {name: {flag for one in options(found) for flag in one.opts} for name, found in ALL.items()}
    assert {name for name in flags if "--tokens" in flags[name]} == {
        "cache",
        "extend",
        "circuits-model",
        "demo",
        "steer",
    }
    assert {name for name in flags if "--rows" in flags[name]} == {"train", "analyze", "export", "import"}


def test_every_command_that_makes_or_shows_something_has_json() -> None:
    without = {name for name, found in ALL.items() if "--json" not in {one.opts[0] for one in options(found)}}
    assert {name for name in without if name.split()[0] not in WITHOUT_JSON} == set()


@pytest.mark.parametrize("alias", ALIASES)
def test_another_name_of_a_flag_works_and_help_does_not_show_it(alias: str) -> None:
    taken = 0
    for name, found in ALL.items():
        known = [one.opts[0].removeprefix("--").replace("-", "_") for one in options(found)]
        if not isinstance(found, SectionCommand) or (meant := current_name(alias, known)) in (alias, None):
            continue
        (flag,) = [one for one in options(found) if one.opts[0] == "--" + meant.replace("_", "-")]
        values = ["1"] * (0 if flag.is_flag else flag.nargs)
        parsed, _, _ = found.make_parser(click.Context(found)).parse_args(["--" + alias.replace("_", "-"), *values])
        assert parsed[flag.name], name
        taken += 1
    assert taken, "no command takes it"


def test_a_setting_has_its_other_names_in_files_and_in_python_too(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 0.5\nbatch_size: 64\n")
    settings = read_settings(TrainSettings, file, {"optimizer": "adamw"})
    assert (settings.lr, settings.batch_rows, settings.optimiser) == (0.5, 64, "adamw")
    with pytest.raises(SettingsError, match="lr is given twice, once by another name"):
        read_settings(TrainSettings, None, {"lr": 1, "learning_rate": 2})


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["train", "--learning-rat", "1"], "did you mean --learning-rate or --expansion-factor?"),
        (["evaluate", "t", "--cach", "c"], "did you mean --cache?"),
        (["score", "text"], "missing option '--transcoders'"),
        (["trian"], "did you mean train"),
        (["train", "c", "--out", "o", "--k", "x"], "architecture.k"),
    ],
)
def test_a_wrong_argument_exits_with_2_and_one_error_line(
    capsys: pytest.CaptureFixture[str], typed: list[str], said: str
) -> None:
    answer = command(capsys, *typed)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("error: ")
    assert said in answer.err.lower()


def test_saved_settings_are_those_that_would_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    flags = ["--architecture", "topk", "--k", 7, "--d-sae", 64, "--lr", "1e-3", "--auxiliary", "auxk"]
    answer = command(capsys, "train", "cache", *flags, "--out", tmp_path / "new", "--save-config", file)
    assert (answer.code, answer.out) == (0, f"{file}: written, nothing else; use it with --config {file}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
    written = file.read_text()
    assert {"lr: 0.001", "d_sae: 64", "# seed: 0", "  k: 7"} <= set(written.splitlines())
    assert yaml.safe_load(written)["architecture"] == {"kind": "topk", "k": 7}
    given = {"architecture": "topk", "k": "7", "d_sae": "64", "lr": "1e-3", "auxiliary": "auxk"}
    assert read_settings(TrainSettings, file, {}) == read_settings(TrainSettings, None, given)


@pytest.mark.parametrize("path", sorted((RELEASED / "transcoders").iterdir()), ids=lambda path: path.name)
def test_an_artifact_is_a_configuration(path: Path) -> None:
    recorded = json.loads((path / "request.json").read_text())["settings"]
    for config in (path, path / "request.json"):
        again = read_settings(TrainSettings, config, {"k": "3"} if "k" in recorded["architecture"] else {})
        for name, value in again.model_dump(mode="json").items():
            if name not in ("architecture", "expansion"):
                assert value == recorded.get(name, value), name
        assert again.architecture.kind == recorded["architecture"]["kind"]


def test_a_cache_is_a_configuration_and_other_artifacts_are_refused(tmp_path: Path) -> None:
    (cache, *_) = (RELEASED / "caches").iterdir()
    assert read_settings(CacheSettings, cache, {"tokens": "5"}).context_length == 16
    tables = RELEASED / "tables/topk"
    with pytest.raises(SettingsError, match="was made with other settings than this command has, such as"):
        read_settings(TrainSettings, tables, {})
    with pytest.raises(SettingsError, match="several runs"):
        read_settings(TrainSettings, RELEASED / "sweep", {})
    with pytest.raises(SettingsError, match="is no artifact"):
        read_settings(TrainSettings, tmp_path, {})
