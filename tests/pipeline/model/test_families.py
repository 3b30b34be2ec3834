"""Every architecture that TransformerLens lists does in every command what docs/families.md says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.families import Family, architectures, families
from tests.support.family_table import COMMANDS, MARK, PAGE, measure, measured_row, run_commands

OF_EACH_KIND = (
    "AfmoeForCausalLM", "BambaForCausalLM", "BloomForCausalLM", "CohereForCausalLM", "DeepseekV4ForCausalLM",
    "Gemma2ForCausalLM", "Gemma3ForConditionalGeneration", "GraniteForCausalLM, scaled sublayers", "MambaForCausalLM",
    "MixtralForCausalLM", "OPTForCausalLM, OPT-350m's", "T5ForConditionalGeneration",
)  # fmt: skip
"""Families of which every command is run: those of the others do the same calls."""

NORM_BEHIND = ("Gemma2", "Gemma3")
"""Families with a norm between the MLP and the stream."""


def rows_of_the_page() -> list[str]:
    return [line for line in PAGE.read_text(encoding="utf-8").partition(MARK)[2].splitlines() if line.startswith("| `")]


def test_every_architecture_and_configuration_has_its_row_on_the_page() -> None:
    wanted = [f"| `{one.architecture}`{one.note and f', {one.note}'} |" for one in families()]
    assert [row[: len(start)] for row, start in zip(rows_of_the_page(), wanted, strict=True)] == wanted
    assert {one.architecture for one in families()} == set(architectures())


@pytest.mark.filterwarnings("ignore:.*hook alias.* did not resolve:UserWarning")  # GPT2LMHeadCustomModel's, unused
@pytest.mark.slow
@pytest.mark.parametrize("family", families(), ids=lambda one: one.label)
def test_what_can_be_done_is_what_its_row_says(family: Family) -> None:
    assert measured_row(family) in rows_of_the_page(), "python -m tests.support.family_table writes the table anew"


@pytest.mark.slow
@pytest.mark.parametrize("label", OF_EACH_KIND)
def test_every_command_works_or_refuses_as_the_row_says(tmp_path: Path, label: str) -> None:
    (family,) = (one for one in families() if one.label == label)
    outcome = measure(family, tmp_path)
    wanted = {name: bool(outcome.works.get(needed)) for name, needed in COMMANDS.items()}
    wanted["fold-norm"] &= not label.startswith(NORM_BEHIND)  # other tools have no hook before it
    assert run_commands(outcome, tmp_path) == wanted
