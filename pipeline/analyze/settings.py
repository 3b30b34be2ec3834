"""The settings of ``pipeline analyze``, and how they are read together with those of fresh text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tailrace.pipeline.live.settings import FreshText
from tailrace.pipeline.shared.options import read_settings, read_settings_together, setting_fields
from tailrace.storage.errors import SettingsError
from tailrace.storage.settings import Quantity, Settings


class AnalyzeSettings(Settings):
    """What to count, over which rows."""

    help_sections: ClassVar = {
        "split": "What to read",
        "examples": "Examples",
        "activations": "What to count",
        "window_before": "Examples",
        "without_model": "What to count",
    }
    later: ClassVar = ("connections",)
    help_basics: ClassVar = (
        *("split", "rows", "examples", "random_examples", "activations"),
        *("window_before", "window_after", "without_model", "seed"),
    )

    split: Literal["heldout", "train"] = "heldout"
    """Rows to read: heldout (documents the transcoder never saw) or train."""

    rows: Quantity | None = Field(default=None, gt=0)
    """Read about this many rows, those of contexts drawn uniformly from the split; all of them if not given. With
    --live: the first of the text."""

    examples: int = Field(default=20, ge=1)
    """Strongest examples kept per feature, at most one from each context."""

    bands: int = Field(default=5, ge=1)
    """Equal parts of the range from zero to a feature's maximum that examples are taken from."""

    band_examples: int = Field(default=5, ge=0)
    """Examples per feature and band."""

    random_examples: int = Field(default=10, ge=0)
    """Examples per feature taken from all rows where it is active."""

    seed: int = 0
    """Decides which contexts --rows draws, and which examples of bands and of active rows are taken."""

    activations: Literal["all", "none"] | Annotated[Quantity, Field(gt=0)] = 2_000_000
    """Rows, from the first read, whose activations are kept one by one (activations/, rows and coactivation, and
    examples of bands and of active rows): a number, all or none. About 8 bytes per active feature of a row, and 16 in
    scratch."""

    coactivation_floor: float = Field(default=1e-4, ge=0, le=1)
    """Share of rows on which a feature must be active to be counted together with others."""

    window_before: int = Field(default=16, ge=0, lt=2**31)
    """Tokens shown before an example, within its context."""

    window_after: int = Field(default=16, ge=0, lt=2**31)
    """Tokens shown after an example, within its context."""

    without_model: bool = False
    """Leave the language model's weights out: no promoted tokens, no connections.parquet."""

    connections: int = Field(default=10, ge=1)
    """Tokens, and features of each --downstream transcoder, kept at either end of connections.parquet."""

    block_rows: int = Field(default=8192, ge=1)
    """Rows encoded at once. Activations are kept where they are above zero only, so this costs little memory."""


def read_flat(
    given: Mapping[str, Any], config: Path | None = None, *, is_live: bool
) -> tuple[AnalyzeSettings, FreshText | None]:
    """Read settings by the names of their flags, and those of the text; a hub dataset's split is not the cache's."""
    given = {name: value for name, value in given.items() if value is not None and value != ()}
    if not is_live:
        text = setting_fields(FreshText).keys() - AnalyzeSettings.model_fields
        if flags := ", ".join(f"--{name.replace('_', '-')}" for name in given if name in text):
            raise SettingsError(f"{flags}: only with --live; a cache has decided it already. Leave it out")
        return read_settings(AnalyzeSettings, config, given), None
    split = {"split": given.pop("split")} if "split" in given else {}
    settings, fresh = read_settings_together([AnalyzeSettings, FreshText], config, given)
    assert isinstance(settings, AnalyzeSettings)
    return settings, FreshText.read(fresh.model_dump(), split, where="the settings")
