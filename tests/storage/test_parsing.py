"""A few bytes that would exhaust a parser, or whatever prints its value, are refused in a moment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tailrace.storage.errors import SettingsError
from tailrace.storage.parsing import DEEPEST_YAML, LONGEST_YAML, parse_json, read_text, read_yaml, shown

ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(8)
)
"""Some 400 bytes that stand for a thousand million values."""


@pytest.mark.parametrize("value", [None, True, -0.5, 10**30, "ß\n", [], {"a": [1, {"b": None}]}, [[[]]] * 3])
def test_json_is_read_as_itself(value: object) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 50_000, "recursion limit exceeded"),
        ('{"a":' * 50_000, "recursion limit exceeded"),
        ("9" * 5000, "number out of range"),
        ("{", "EOF while parsing an object"),
        ("", "EOF while parsing a value"),
        (b"\xff", "expected value"),
        ("\ud800", "surrogates not allowed"),
    ],
)
def test_what_is_no_json_is_a_value_error(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("lr: 2001-13-45", "month must be in 1..12"),
        ("seed: " + "9" * 5000, "Exceeds the limit"),
        ("seed: 0x" + "f" * 5000, "a number of more than 1024 bits"),
        ("[" * 20_000, "nested too deeply"),
        ("a: " * 1 + "[" * DEEPEST_YAML + "]" * DEEPEST_YAML, "more than 50 deep"),
        ("a: &a [*a]", "refers to itself"),
        (ALIASES, "more than 200,000 values"),
        ("a: !!timestamp x", "cannot be read as YAML"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("#" * (LONGEST_YAML + 1), "longer than 1 MiB"),
    ],
)
def test_yaml_that_exhausts_its_reader_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "hostile.yaml").write_text(text)
    with pytest.raises(SettingsError, match=reason):
        read_yaml(tmp_path / "hostile.yaml")


def test_a_name_that_is_given_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("base: &base {k: 1}\nrun: {<<: *base, k: 2}\nlr: 1\nlr: 2\n")
    with pytest.raises(SettingsError, match=r"lr is given twice\s+in .*line 4"):
        read_yaml(tmp_path / "twice.yaml")
    (tmp_path / "twice.yaml").write_text("base: &base {k: 1}\nrun: {<<: *base, k: 2}\n")
    assert read_yaml(tmp_path / "twice.yaml") == {"base": {"k": 1}, "run": {"k": 2}}


def test_yaml_of_a_device_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"/dev/zero: .*longer than 1 MiB"):
        read_yaml(Path("/dev/zero"))


def test_yaml_with_aliases_is_read(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text("one: &one {k: [1, 2]}\ntwo: {<<: *one, lr: 0.1}\n")
    assert read_yaml(tmp_path / "good.yaml") == {"one": {"k": [1, 2]}, "two": {"k": [1, 2], "lr": 0.1}}


def test_a_value_is_shown_in_a_few_words() -> None:
    assert [shown(value) for value in (3, "x", [1, 2], {"a": None})] == ["3", "'x'", "[1, 2]", "{'a': None}"]
    assert len(shown("x" * 10**6)) <= 201
    assert len(shown([["x" * 1000] * 1000] * 1000)) <= 201


def test_a_text_ends_and_has_its_line_breaks_as_one_character(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes("\ufeffa\r\nb".encode())
    assert read_text(tmp_path / "text", "utf-8-sig") == "a\nb"
    with pytest.raises(ValueError, match="it is longer than 256 MiB"):
        read_text(Path("/dev/zero"))
    (tmp_path / "text").write_bytes(b"\xff")
    with pytest.raises(UnicodeDecodeError):
        read_text(tmp_path / "text")


def test_half_a_character_is_no_setting(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text('site: "\\ud800"\n')
    with pytest.raises(SettingsError, match="half of a surrogate pair"):
        read_yaml(tmp_path / "s.yaml")
