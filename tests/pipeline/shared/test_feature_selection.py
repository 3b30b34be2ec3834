"""``--feature`` of a command about one transcoder: numbers, lists and ranges, told in one way everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tailrace.pipeline.dashboard.settings import DashboardSettings
from tailrace.pipeline.shared.feature_selection import parse_features
from tailrace.pipeline.shared.options import read_settings
from tailrace.storage.errors import SettingsError


@pytest.mark.parametrize(
    ("texts", "features"),
    [
        ((), []),
        (("2",), [2]),
        ((" 1-3 , 0 ",), [1, 2, 3, 0]),
        (("2,2,1-2",), [2, 1]),
        (("3", "0,2 - 3"), [3, 0, 2]),
    ],
)
def test_features_are_chosen_by_number_list_and_range_in_the_order_they_are_named(
    texts: tuple[str, ...], features: list[int]
) -> None:
    assert parse_features(texts, 4) == features


def test_everything_wrong_with_chosen_features_is_told_at_once() -> None:
    with pytest.raises(SettingsError) as error:
        parse_features(["1,x,3-1", "9,"], 4)
    assert str(error.value).splitlines() == [
        "--feature: not every part is a feature, or a range such as 100-200, of these:",
        "  'x' is no feature and no range of features",
        "  '3-1' ends before it begins; write 1-3",
        "  '9' is beyond the last feature, 3",
        "  '' is no feature and no range of features",
    ]


def test_a_range_beyond_the_last_feature_is_refused_without_being_counted_through() -> None:
    with pytest.raises(SettingsError, match="'0-9999999999999' is beyond the last feature, 3"):
        parse_features(["0-9999999999999"], 4)


@pytest.mark.parametrize("written", ["1,5-9,12", "'1, 5-9, 12'", "[1, 5-9, 12]", '["1,5-9", 12]'])
def test_several_ways_to_write_the_same_features_are_one_setting(tmp_path: Path, written: str) -> None:
    (tmp_path / "dashboard.yaml").write_text(f"feature: {written}\n")
    wanted = read_settings(DashboardSettings, None, {"feature": ("1,5-9", "12")})
    assert wanted.feature == ("1", "5-9", "12")
    assert read_settings(DashboardSettings, tmp_path / "dashboard.yaml", {}) == wanted


@pytest.mark.parametrize("value", [1.5, [True], {"first": 1}])
def test_what_chooses_no_features_is_refused_by_the_settings(value: Any) -> None:
    with pytest.raises(SettingsError, match="feature"):
        DashboardSettings.read({"feature": value})
