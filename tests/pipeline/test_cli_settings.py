"""Flags are generated from settings classes: all there, all documented, all problems reported together."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar, Literal

import click
import pytest
from pydantic import Field

from tailrace.pipeline import api, cli
from tailrace.pipeline.analyze.settings import AnalyzeSettings
from tailrace.pipeline.cache.settings import CacheSettings
from tailrace.pipeline.query.views import parse_tables
from tailrace.pipeline.shared import run_options
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.shared.options import read_settings, settings_options
from tailrace.pipeline.train.grid import grid_of, read_grid
from tailrace.storage.errors import SettingsError
from tailrace.storage.settings import Quantity, Retired, Settings
from tailrace.training.loop.settings import TrainSettings
from tests.support.cache_jobs import command


def given(settings: type[Settings], *arguments: str) -> dict[str, Any]:
    """Return what a command gets from flags."""
    flags: dict[str, Any] = taking(settings).main(list(arguments), standalone_mode=False)
    return flags


def taking(settings: type[Settings]) -> click.Command:
    """Return a command that returns what it gets."""

    @click.command()
    @settings_options(settings)
    def take(**flags: Any) -> dict[str, Any]:
        return flags

    return take


def read(settings: type[Settings], *arguments: str) -> Any:
    flags = given(settings, *arguments)
    return read_settings(settings, flags.pop("config"), flags)


@pytest.mark.parametrize(
    ("name", "settings"), [("cache", CacheSettings), ("train", TrainSettings), ("analyze", AnalyzeSettings)]
)
def test_help_lists_every_setting_with_its_description_and_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, settings: type[Settings]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    answer = command(capsys, name, "--help-all")
    text = " ".join(re.sub(r"(?<=\w)-\n +", "-", answer.out).split())  # lines end at hyphens, too
    assert answer.code == 0
    for field, about in settings.model_fields.items():
        described = " ".join((about.description or "").split()).replace("``", "")
        assert described, f"{field} has no description"
        flag = f"--[no-]{field}" if about.annotation is bool else f"--{field}"
        assert f"{flag.replace('_', '-')} " in text
        assert described.split(". ")[0].rstrip(".") in text, field
        if about.is_required():
            assert re.search(rf"--{field.replace('_', '-')} \S+ [^\[]*\[required\]", text), field
        elif isinstance(about.default, int | float) and not isinstance(about.default, bool):
            assert f"[default: {about.default}]" in text or f"[default: {about.default:_}]" in text


def test_several_default_values_are_shown_as_they_are_given(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert "[default: 0 1 2 4 8 16 32 64]" in " ".join(command(capsys, "task", "--help").out.split())


def test_settings_of_every_architecture_are_flags_that_say_whose_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = " ".join(command(capsys, "train", "--help-all").out.split())
    assert "--architecture [topk|batch_topk|jumprelu|relu|gated|matryoshka" in text
    assert re.search(r"--k N [^-]*topk[^:]*: ", text)
    assert "--[no-]skip Add a linear path" in text  # every architecture has it
    assert "(it is folded into the encoder when the transcoder is saved). [default: off; with relu: on]" in text
    settings = read(TrainSettings, "--architecture", "topk", "--k", "7", "--steps", "1e3")
    assert (settings.architecture.kind, settings.architecture.k, settings.steps) == ("topk", 7, 1000)
    assert read(TrainSettings, "--k", "7").architecture.k == 7


def test_flags_of_several_kinds_mean_the_default_kind_and_those_of_one_mean_it() -> None:
    default = TrainSettings().architecture.kind
    assert default == "batch_topk"
    assert read(TrainSettings, "--k", "7").architecture.kind == default
    assert read(TrainSettings, "--skip").architecture.kind == default
    assert read(TrainSettings, "--target-l0", "30").architecture.kind == "jumprelu"
    assert read(TrainSettings, "--aux-k", "64").auxiliary.kind == "auxk"
    # The default kind has none.
    with pytest.raises(SettingsError, match="l1: is no setting of batch_topk, but of relu or gated"):
        read(TrainSettings, "--l1", "0.1")


def test_help_of_train_says_what_a_model_is_beside_a_cache(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = " ".join(command(capsys, "train", "--help-all").out.split())
    assert re.search(r"--model TEXT [^-]* With a CACHE: where its model lies now[^\[]*\[required with --live\]", text)


REQUIRED = ["--model", "gpt2", "--dataset", "text.jsonl", "--layers", "8", "--tokens"]


@pytest.mark.parametrize(
    ("name", "needed", "others"),
    [
        (
            "cache",
            ["--out", "--model", "--dataset", "--tokens", "--layers", "--hooks"],
            ["--storage-dtype", "--exclude", "--seed"],
        ),
        ("train", ["--out", "--model", "--dataset", "--layers", "--hooks"], ["--storage-dtype", "--exclude"]),
    ],
)
def test_what_rows_from_a_model_need_comes_before_what_may_be_left_out(
    capsys: pytest.CaptureFixture[str], name: str, needed: list[str], others: list[str]
) -> None:
    flags = re.findall(r"^  (--[a-z-]+)", command(capsys, name, "--help-all").out, re.M)
    assert [flag for flag in flags if flag in needed] == needed
    assert flags.index("--hooks") < min(flags.index(flag) for flag in others)


def test_flags_take_quantities_lists_and_names() -> None:
    settings = read(CacheSettings, *REQUIRED, "1.5M", "--hooks", "a", "--hooks", "b:c", "--shard-rows", "64")
    assert (settings.tokens, settings.hooks, settings.shard_rows) == (1_500_000, ("a", "b:c"), 64)
    assert read(CacheSettings, *REQUIRED, "all").tokens == "all"


def test_flags_override_the_configuration_file_and_nothing_else_does(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("model: gpt2\ndataset: text.jsonl\nlayers: '8'\ntokens: 60M\nseed: 3\ncompression: zstd\n")
    settings = read(CacheSettings, "--config", str(config), "--tokens", "2k", "--seed", "0")
    assert (settings.tokens, settings.seed, settings.compression) == (2000, 0, "zstd")
    assert settings.contexts_per_batch == 32  # neither in the file nor typed: the default


def test_flags_of_an_architecture_are_merged_into_the_one_of_the_file(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("architecture: {kind: topk, k: 5}\nlr: 1e-3\n")
    assert read(TrainSettings, "--config", str(config)).architecture.k == 5
    assert read(TrainSettings, "--config", str(config), "--k", "9").architecture.k == 9
    assert read(TrainSettings, "--config", str(config), "--architecture", "relu").architecture.kind == "relu"


def test_all_problems_of_file_and_flags_come_at_once_and_name_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("model: gpt2\ndataset: text.jsonl\ntokens: 60M\nlayrs: 8\nshard_rows: 100\nchunk_rows: 30\n")
    answer = command(
        capsys, "cache", "--config", config, "--out", tmp_path / "c",
        "--storage-dtype", "float8", "--compression", "zip", "--context-length", "two",
    )  # fmt: skip
    assert answer.code == 2
    assert answer.err.splitlines() == [
        f"error: 6 problems in {config}:",
        "  hooks: no layer and no hook is given: use --layers (such as 8, or all) or --hooks",
        "  context_length: Input should be a valid integer, unable to parse string as an integer (got 'two')",
        "  storage_dtype: Input should be 'auto', 'bfloat16', 'float16', 'float32' or 'int8' (got 'float8')",
        "  compression: Input should be 'none', 'lz4', 'zstd', 'gzip' or 'blosc-zstd' (got 'zip')",
        "  chunk_rows: wanted a divisor of shard_rows (100) (got 30)",
        "  layrs: is no setting; did you mean layers?",
    ]
    assert not (tmp_path / "c").exists()


def test_a_command_without_its_settings_names_all_that_are_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = command(capsys, "cache", "--out", tmp_path / "c")
    assert answer.code == 2
    assert [line.strip() for line in answer.err.splitlines()[1:]] == [
        "model: is required",
        "dataset: is required",
        "tokens: is required",
        "hooks: no layer and no hook is given: use --layers (such as 8, or all) or --hooks",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is no such file"), ("- a", "holds list, wanted a mapping"), ("a: [", "YAML")],
)
def test_a_configuration_that_cannot_be_read_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    config = tmp_path / "run.yaml"
    if content is not None:
        config.write_text(content)
    with pytest.raises(SettingsError, match=message) as refused:
        read(CacheSettings, "--config", str(config))
    assert str(config) in str(refused.value)


@pytest.mark.parametrize(
    ("device", "said"),
    [("gpu", "is not a device; use auto, cpu, cuda"), ("cpu:x", "is not a device"), ("cuda:99", "--device cpu")],
)
def test_a_device_that_is_not_there_is_told_in_a_line(device: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said) as caught, Compute(device).opened():
        pass
    assert str(caught.value).startswith(f"--device {device}: ")
    assert len(str(caught.value)) < 200


class Penalty(Settings):
    kind: Literal["l1"] = "l1"
    strength: float = 1.0
    """How strong."""
    retired: ClassVar = {"weight": Retired("strength", "0.3")}


class Nothing(Settings):
    kind: Literal["none"] = "none"


class Renamed(Settings):
    batch_rows: Quantity = 1
    """Rows of a batch."""
    is_quiet: bool = False
    """Whether to be quiet."""
    names: tuple[str, ...] = ()
    """Several."""
    penalty: Nothing | Penalty = Field(default=Nothing(), discriminator="kind")
    """A choice."""
    retired: ClassVar = {
        "rows_per_batch": Retired("batch_rows", "0.3"),
        "silent": Retired("is_quiet", "0.3"),
        "labels": Retired("names", "0.3"),
        "ancient": Retired("batch_rows", "0.1", is_refused=True),
    }


@pytest.mark.parametrize(
    ("by_old_names", "by_new_names"),
    [
        (["--rows-per-batch", "4k"], Renamed(batch_rows=4000)),
        (["--silent"], Renamed(is_quiet=True)),
        (["--labels", "a", "--labels", "b"], Renamed(names=("a", "b"))),
        (["--penalty", "l1", "--weight", "3"], Renamed(penalty=Penalty(strength=3))),
        (["--weight", "3"], Renamed(penalty=Penalty(strength=3))),
    ],
)
def test_a_retired_flag_is_taken_with_a_warning_that_names_the_new_one(
    caplog: pytest.LogCaptureFixture, by_old_names: list[str], by_new_names: Renamed
) -> None:
    assert read(Renamed, *by_old_names) == by_new_names
    old = by_old_names[-2 if len(by_old_names) > 1 else -1].removeprefix("--").replace("-", "_")
    new = {**Renamed.retired, **Penalty.retired}[old].new
    assert caplog.messages == [f"{old} is called {new} since 0.3; write {new}"]


def test_a_retired_setting_in_a_file_is_taken_and_flags_of_either_name_override_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("rows_per_batch: 5\npenalty: {kind: l1, weight: 2}\n")
    assert read(Renamed, "--config", str(file)) == Renamed(batch_rows=5, penalty=Penalty(strength=2))
    assert len(caplog.messages) == 2
    for flags in (["--batch-rows", "6", "--strength", "3"], ["--rows-per-batch", "6", "--weight", "3"]):
        changed = read(Renamed, "--config", str(file), *flags)
        assert changed == Renamed(batch_rows=6, penalty=Penalty(strength=3))


def test_what_was_recorded_by_a_retired_name_is_read_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    recorded = {"ancient": 7, "penalty": {"kind": "l1", "weight": 2}}
    assert Renamed.model_validate(recorded) == Renamed(batch_rows=7, penalty=Penalty(strength=2))
    assert caplog.messages == []


def test_a_name_whose_time_is_over_is_refused_in_the_words_of_the_warning() -> None:
    with pytest.raises(SettingsError, match=r"^ancient is called batch_rows since 0\.1; write batch_rows$"):
        read(Renamed, "--ancient", "5")


def test_a_setting_by_both_its_names_is_refused() -> None:
    with pytest.raises(SettingsError, match="batch_rows is given twice"):
        read(Renamed, "--batch-rows", "5", "--rows-per-batch", "5")
    with pytest.raises(ValueError, match="rows_per_batch is batch_rows: give one of them"):
        Renamed.model_validate({"rows_per_batch": 5, "batch_rows": 5})


def test_a_sweep_takes_retired_names_and_warns_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainSettings, "retired", {"learning_rate": Retired("lr", "0.3")})
    file = tmp_path / "sweep.yaml"
    file.write_text("learning_rate: [0.1, 0.2]")
    for points in (
        read_grid(["learning_rate=0.1,0.2"], None),
        read_grid([], file),
        grid_of({"learning_rate": [0.1, 0.2]}),
    ):
        assert [{name: float(value) for name, value in point.items()} for point in points] == [{"lr": 0.1}, {"lr": 0.2}]
    assert len(caplog.messages) == 3


def test_help_shows_no_retired_flag() -> None:
    shown = {parameter.name for parameter in taking(Renamed).params if not getattr(parameter, "hidden", False)}
    assert {"batch_rows", "strength"} <= shown
    assert shown.isdisjoint(Renamed.retired.keys() | Penalty.retired.keys())


def test_python_keywords_take_retired_names(caplog: pytest.LogCaptureFixture) -> None:
    given = {"rows_per_batch": 5, "labels": ["a", "b"], "penalty": {"kind": "l1", "weight": 2}}
    asked = api._read(Renamed, None, given)
    assert asked == Renamed(batch_rows=5, names=("a", "b"), penalty=Penalty(strength=2))
    assert len(caplog.messages) == 3


def test_a_home_folder_that_the_shell_leaves_is_the_home_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A shell reads ~ in ``--out ~/x``, and not in ``--out=~/x``."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for kind in (run_options.ARTIFACT, run_options.FILE, run_options.FILE_OR_ARTIFACT):
        assert kind.convert("~/x", None, None) == tmp_path / "x"
        assert kind.convert("x~", None, None) == Path("x~")
    assert parse_tables(["~/t"]) == [tmp_path / "t"]
    assert parse_tables(["a=~/t"]) == {"a": tmp_path / "t"}
    flags = [one for command in commands() for one in command.params if isinstance(one.type, click.Path)]
    assert len(flags) > 40
    assert {type(flag.type) for flag in flags} == {run_options.HomePath}


def commands() -> list[click.Command]:
    found = [cli.cli.get_command(click.Context(cli.cli), name) for name in cli.COMMANDS]
    found += [one for group in found if isinstance(group, click.Group) for one in group.commands.values()]
    return [one for one in found if one is not None]
