"""Settings are strict: quantities are exact, every problem is told at once, and the file it is in is named."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from tailrace.storage.errors import SettingsError
from tailrace.storage.settings import Quantity, Settings, load_yaml, parse_quantity


class Example(Settings):
    """Settings of the tests."""

    rows: Quantity
    """How many rows."""
    name: str = "x"
    """What it is called."""
    seed: Quantity = 0
    """Where randomness begins."""


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("4096", 4096),
        ("60M", 60_000_000),
        ("60m", 60_000_000),
        ("1.5GB", 1_500_000_000),
        ("2 GiB", 2 * 2**30),
        ("0.5k", 500),
        ("1e6", 1_000_000),
        ("1E6", 1_000_000),
        ("1_000", 1000),
        (" 3b ", 3_000_000_000),
        ("1T", 10**12),
        ("0.1M", 100_000),
        ("9007199254740993", 2**53 + 1),  # no float64
        ("1.1e1", 11),
    ],
)
def test_quantities_are_read_exactly(text: str, number: int) -> None:
    assert parse_quantity(text) == number
    assert Example.read({"rows": text}).rows == number


@given(st.integers(0, 2**70))
def test_a_whole_number_is_read_as_itself(number: int) -> None:
    assert parse_quantity(str(number)) == number


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1.5", "'1.5' is not a whole number"),
        ("0.0001k", "is not a whole number"),
        ("sixty", "is not a quantity; write a number such as 4096, 60M, 1.5GB or 2GiB"),
        ("-5", "is not a quantity"),
        ("60 MM", "is not a quantity"),
        ("", "is not a quantity"),
        ("1e400", "is not a quantity"),
        ("1e-3", "is not a quantity"),
    ],
)
def test_what_is_no_quantity_is_refused_with_the_setting_named(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=f"rows: .*{message}"):
        Example.read({"rows": text})


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        Example.read({"rows": "many", "batchsize": 3, "name": 7}, where="run.yaml")
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 problems in run.yaml:"
    assert sorted(lines[1:]) == [
        "  batchsize: is no setting",
        "  name: Input should be a valid string (got 7)",
        "  rows: 'many' is not a quantity; write a number such as 4096, 60M, 1.5GB or 2GiB (got 'many')",
    ]


def test_a_missing_setting_is_told() -> None:
    with pytest.raises(SettingsError, match=r"1 problem in settings:\n  rows: is required"):
        Example.read({})


def test_later_sources_win_before_anything_is_checked() -> None:
    assert Example.read({"rows": "nonsense", "name": "a"}, {"rows": 5}) == Example(rows=5, name="a")


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Example(rows=1).rows = 2  # type: ignore[misc]


def test_the_text_under_a_setting_is_its_description() -> None:
    assert Example.model_fields["rows"].description == "How many rows."


def test_a_file_is_read_and_overridden(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("rows: 60M\nseed: 3\nname: größe\n", encoding="utf-8")
    assert Example.read_file(tmp_path / "run.yaml", {"seed": 4}) == Example(rows=60_000_000, seed=4, name="größe")


def test_an_empty_file_has_no_settings(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("# nothing\n")
    assert load_yaml(tmp_path / "run.yaml") == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"rows: [1", "cannot be read as YAML"),
        (b"- rows\n- name\n", "holds list, wanted a mapping"),
        (b"just text", "holds str, wanted a mapping"),
        (b"name: \xff\xfe", "cannot be read as YAML"),
        (None, "there is no such file; check the path of the settings"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(SettingsError, match=rf"bad\.yaml: {message}"):
        Example.read_file(tmp_path / "bad.yaml")


@pytest.mark.parametrize("key", [1, None, True])
def test_a_key_that_is_no_name_is_no_setting(key: Any) -> None:
    with pytest.raises(SettingsError, match="1 problem in settings"):
        Example.read({"rows": 1, key: 2})


class Round(Settings):
    """A shape without corners."""

    kind: Literal["round"] = "round"
    radius: int = 1


class Square(Settings):
    """A shape with corners."""

    kind: Literal["square"] = "square"
    side: int = 1


class Drawing(Settings):
    """Settings with a union told apart by ``kind``."""

    shape: Annotated[Round | Square, Field(discriminator="kind")] = Round()
    colour: str = "red"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": {"kind": "round", "side": 2}}, "shape.side: is no setting of round, but of square"),
        ({"shape": {"kind": "round", "radios": 2}}, "shape.radios: is no setting of round; did you mean radius?"),
        ({"shape": {"kind": "oval"}}, "shape: wanted one of round, square (got 'oval')"),
        ({"colours": "blue"}, "colours: is no setting; did you mean colour?"),
        ({"size": 3}, "size: is no setting"),
        (
            {"side": 3},
            "side: is no setting by itself; write it below shape, such as shape: {kind: square, side: …}",
        ),
    ],
)
def test_a_setting_of_another_kind_and_a_misspelt_one_are_told_apart(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as refused:
        Drawing.read(changes)
    assert str(refused.value).splitlines() == ["1 problem in settings:", f"  {message}"]


def test_a_number_beyond_64_bits_is_refused() -> None:
    with pytest.raises(SettingsError, match="rows, seed: wanted a number of at most 64 bits"):
        Example.read({"rows": 2**64, "seed": "9" * 30})
    assert Example.read({"rows": 1, "seed": 2**64 - 1}).seed == 2**64 - 1


def test_yes_is_no_number() -> None:
    with pytest.raises(SettingsError, match=r"rows: .*'true' is not a quantity") as refused:
        Example.read({"rows": True, "name": False})
    assert str(refused.value).startswith("2 problems")


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"name: .*surrogate"):
        Example.read({"rows": 1, "name": "b\ud800"})


def test_of_a_hundred_problems_some_are_listed() -> None:
    with pytest.raises(SettingsError) as refused:
        Example.read({"rows": 1, **{f"unknown{n}": "x" * 10_000 for n in range(100)}})
    assert str(refused.value).startswith("100 problems in settings:\n  unknown0: is no setting")
    assert str(refused.value).endswith("\n  and 50 more")
    assert len(str(refused.value)) < 5000
