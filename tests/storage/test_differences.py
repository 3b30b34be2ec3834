"""In what two JSON values differ: every difference is told, in a line for what is alike."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tailrace.storage.artifact import digest
from tailrace.storage.draft import list_differences


def layers(n: int, **changes: Any) -> dict[str, Any]:
    return {f"layer{layer}": {"digest": digest([layer, *changes.values()])} for layer in range(n)}


def test_values_are_told_with_the_name_of_their_place() -> None:
    found, wanted = {"a": {"b": 1, "same": 2}, "c": None}, {"a": {"b": 3, "same": 2}, "c": "x"}
    assert list_differences(found, wanted) == [
        "a.b: there it is 1, asked for 3",
        "c: there it is None, asked for 'x'",
    ]
    assert list_differences(found, found) == []


def test_digests_are_told_by_their_first_twelve_characters() -> None:
    whole = "sha256:" + "0123456789abcdef" * 4
    assert list_differences({"digest": whole}, {"digest": "sha256:" + "f" * 64}) == [
        "digest: there it is 'sha256:0123456789ab…', asked for 'sha256:ffffffffffff…'"
    ]
    (line,) = list_differences({"files": [{"name": "a", "checksum": whole}]}, {"files": []})
    assert line == "files: there it is [{'name': 'a', 'checksum': 'sha256:0123456789ab…'}], asked for []"
    assert list_differences({"id": "f1d280de2b8b18e9"}, {"id": "x"}) == [
        "id: there it is 'f1d280de2b8b18e9', asked for 'x'"
    ]


def test_transcoders_of_all_layers_have_one_line_and_three_have_their_own() -> None:
    found, wanted = ({"transcoders": layers(30, seed=seed), "k": 1} for seed in (0, 1))
    assert list_differences(found, wanted) == [
        "transcoders.*.digest: there it is another than asked for (layer0, layer1, layer10 and 27 more)"
    ]
    assert len(list_differences(layers(3, seed=0), layers(3, seed=1))) == 3


def test_a_setting_changed_in_every_run_has_one_line_and_one_changed_apart_its_own() -> None:
    found = {"runs": {f"k={k}": {"settings": {"k": k, "lr": 0.1, "steps": 9}} for k in range(5)}}
    wanted = {"runs": {f"k={k}": {"settings": {"k": k, "lr": 0.2, "steps": 9}} for k in range(5)}}
    wanted["runs"]["k=2"]["settings"]["steps"] = 10
    assert list_differences(found, wanted) == [
        "runs.*.settings.lr: there it is 0.1, asked for 0.2 (k=0, k=1, k=2 and 2 more)",
        "runs.k=2.settings.steps: there it is 9, asked for 10",
    ]


def test_parts_that_only_one_side_has_are_told_together() -> None:
    assert list_differences({"runs": layers(2)}, {"runs": layers(7)}) == [
        "runs.*: is not there, asked for (layer2, layer3, layer4 and 2 more)"
    ]


def test_settings_that_happen_to_change_alike_keep_their_names() -> None:
    found, wanted = dict.fromkeys("abcde", 0), dict.fromkeys("abcde", 1)
    assert list_differences(found, wanted) == [f"{name}: there it is 0, asked for 1" for name in "abcde"]


values = st.recursive(
    st.none() | st.integers(0, 2), lambda inner: st.dictionaries(st.sampled_from("abcdef"), inner), max_leaves=30
)


@given(values, values)
def test_there_is_a_line_if_and_only_if_something_differs(found: Any, wanted: Any) -> None:
    assert bool(list_differences(found, wanted)) == (_bare(found) != _bare(wanted))


def _bare(value: Any) -> Any:
    """Leave out what is null: absent and null are the same to a reader."""
    if not isinstance(value, dict):
        return value
    return {key: _bare(inner) for key, inner in value.items() if inner is not None}
