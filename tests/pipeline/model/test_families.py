"""Every architecture that TransformerLens lists does in every command what docs/families.md says."""

from __future__ import annotations

import pytest

from tests.support.families import Family, architectures, families
from tests.support.family_table import MARK, PAGE, measured_row


def rows_of_the_page() -> list[str]:
    return [line for line in PAGE.read_text(encoding="utf-8").partition(MARK)[2].splitlines() if line.startswith("| `")]


def test_every_architecture_and_configuration_has_its_row_on_the_page() -> None:
    wanted = [f"| `{one.architecture}`{one.note and f', {one.note}'} |" for one in families()]
    assert [row[: len(start)] for row, start in zip(rows_of_the_page(), wanted, strict=True)] == wanted
    assert {one.architecture for one in families()} == set(architectures())


@pytest.mark.slow
@pytest.mark.parametrize("family", families(), ids=lambda one: one.label)
def test_what_commands_do_is_what_its_row_says(family: Family) -> None:
    assert measured_row(family) in rows_of_the_page(), "python -m tests.support.family_table writes the page anew"
