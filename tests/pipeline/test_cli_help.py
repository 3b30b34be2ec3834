"""Help: what people change first, all else under headings, as wide as the terminal; commands in groups."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
import pytest

from tailrace.pipeline import cli
from tailrace.pipeline.analyze.settings import AnalyzeSettings
from tailrace.pipeline.cache.settings import CacheSettings
from tailrace.pipeline.live.settings import FreshText, LiveSettings
from tailrace.pipeline.shared.options import setting_fields, settings_options
from tailrace.pipeline.shared.sections import LONG, RUNNING, SectionCommand
from tailrace.pipeline.shared.units import WIDEST
from tailrace.pipeline.train.settings import ModelScoreSettings
from tailrace.storage.settings import Settings
from tailrace.training.loop.settings import TrainSettings
from tests.support.cache_jobs import command

LONG_COMMANDS: dict[str, tuple[type[Settings], ...]] = {
    "cache": (CacheSettings,),
    "train": (TrainSettings, ModelScoreSettings, LiveSettings),
    "analyze": (AnalyzeSettings, FreshText),
}


def commands() -> Iterator[tuple[str, SectionCommand]]:
    context = click.Context(cli.cli)
    for name in cli.COMMANDS:
        found = cli.cli.get_command(context, name)
        inside = found.commands.values() if isinstance(found, click.Group) else [found]
        yield from ((name, one) for one in inside if isinstance(one, SectionCommand))


def headings(text: str) -> dict[str, list[str]]:
    """Return the flags of a help page by heading."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if heading := re.fullmatch(r"(\S.*):", line):
            found[heading[1]] = flags = []
        elif flag := re.match(r"  (?:-h, )?--(?:\[no-\])?([\w-]+)", line):
            flags.append(flag[1])
    return found


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "blind"])
def test_every_option_of_a_command_is_in_its_whole_help_once(capsys: pytest.CaptureFixture[str], name: str) -> None:
    (own,) = [one for known, one in commands() if known == name]
    there = [flag for flags in headings(command(capsys, name, "--help-all").out).values() for flag in flags]
    options = [one.opts[0].removeprefix("--") for one in own.params if isinstance(one, click.Option) and not one.hidden]
    assert sorted(there) == sorted([*options, "help"])


@pytest.mark.parametrize("name", LONG_COMMANDS)
def test_a_long_command_shows_first_what_people_change_and_names_the_other_headings(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    whole = headings(command(capsys, name, "--help-all").out)
    text = command(capsys, name, "--help").out
    short = headings(text)
    *_, more = short
    assert list(short) == ["Basics", RUNNING, more]
    assert (short["Basics"], short[RUNNING]) == (whole["Basics"], whole[RUNNING])
    others = [heading for heading in whole if heading not in short]
    assert more == f"{sum(len(whole[heading]) for heading in others)} more with pipeline {name} --help-all"
    listed = " ".join(text.partition(f"{more}:")[2].split()).split(", ")
    assert listed == list(dict.fromkeys(heading.split(":")[0] for heading in others))


@pytest.mark.parametrize(("name", "classes"), LONG_COMMANDS.items())
def test_every_setting_stands_under_a_heading_or_is_one_of_the_first(
    capsys: pytest.CaptureFixture[str], name: str, classes: tuple[type[Settings], ...]
) -> None:
    basics = headings(command(capsys, name, "--help-all").out)["Basics"]
    first = [one.replace("_", "-") for one in classes[0].help_basics]
    assert [flag for flag in basics if flag in first] == first
    settings = {
        one.replace("_", "-") for one in dict.fromkeys(name for kind in classes for name in setting_fields(kind))
    }
    beside = {"model"} if name == "analyze" else set()  # which is no setting there
    assert settings & set(basics) - beside == set(first)


def test_the_help_of_train_begins_with_at_most_twelve_flags_and_those_of_running(
    capsys: pytest.CaptureFixture[str],
) -> None:
    short = headings(command(capsys, "train", "--help").out)
    assert [flag for flag in short["Basics"] if flag not in ("help", "help-all")] == [
        "out", "config", "site", "architecture", "k", "expansion", "d-sae", "epochs", "rows", "batch-rows", "lr",
        "auxiliary",
    ]  # fmt: skip
    assert short[RUNNING] == [
        "generation", "save-config", "dry-run", "fresh", "checkpoint-steps", "json", "workers", "device", "threads",
        "quiet",
    ]  # fmt: skip


def test_only_long_commands_have_a_short_help(capsys: pytest.CaptureFixture[str]) -> None:
    shortened = [name for name, one in commands() if one.is_long]
    assert shortened == list(LONG_COMMANDS)
    assert command(capsys, "info", "--help").out == command(capsys, "info", "--help-all").out
    assert LONG == 25


def settings_classes(kind: type[Settings] = Settings) -> Iterator[type[Settings]]:
    for one in kind.__subclasses__():
        if one.__module__.startswith("tailrace."):
            yield one
            yield from settings_classes(one)


def test_headings_begin_at_settings_that_there_are() -> None:
    list(commands())
    classes = dict.fromkeys(settings_classes())
    assert TrainSettings in classes
    for one in classes:
        assert set(one.help_sections) <= set(one.model_fields), one
        assert set(one.help_basics) <= set(setting_fields(one)), one


def test_a_new_setting_stands_under_the_heading_of_the_one_above_it() -> None:
    class Meal(Settings):
        help_sections = {"soup": "Starters", "cake": "Desserts"}  # noqa: RUF012
        soup: int = 1
        """Plates of soup."""
        bread: bool = True
        """Bread beside it."""
        cake: int = 20_000
        """Crumbs of cake."""

    @click.command("eat", cls=SectionCommand)
    @settings_options(Meal)
    def eat(**_: object) -> None:
        """Eat."""

    text = eat.get_help(click.Context(eat))
    settings = {"Starters": ["soup", "bread"], "Desserts": ["cake"]}
    assert headings(text) == {"Options": ["config", "help"], **settings, RUNNING: ["save-config"]}
    assert re.search(r"^  --\[no-\]bread +Bread beside it. \[default: on\]$", text, re.MULTILINE)
    assert "Crumbs of cake. [default: 20_000]" in text


@pytest.mark.parametrize(("columns", "least"), [(80, 70), (140, 100)])
def test_help_is_as_wide_as_the_terminal_up_to_what_can_be_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int, least: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    options = command(capsys, "cache", "--help").out.partition("Basics:")[2]
    assert least <= max(map(len, options.splitlines())) <= min(columns, WIDEST)


def test_the_list_of_commands_is_in_groups_that_hold_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    text = command(capsys, "--help").out
    assert re.findall(r"^(\w+):", text, re.M)[2:] == list(cli.GROUPS)
    assert re.findall(r"^  ([a-z][\w-]*)  ", text, re.M) == list(cli.COMMANDS)
    assert sum(map(len, cli.GROUPS.values())) == len(cli.COMMANDS)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("trian", "no command 'trian'; did you mean train? There are\n  Data: cache, extend, "),
        ("evalute", "did you mean evaluate?"),
        ("xyz", "no command 'xyz'; there are\n  Data: cache, "),
    ],
)
def test_a_mistyped_command_is_answered_with_the_nearest_one(
    capsys: pytest.CaptureFixture[str], typed: str, said: str
) -> None:
    answer = command(capsys, typed)
    assert answer.code == 2
    assert said in answer.err
    assert all(name in answer.err for name in cli.COMMANDS)
