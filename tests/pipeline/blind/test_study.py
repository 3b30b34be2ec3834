"""A blind study withholds what the text says, keeps a record that cannot be changed unseen, and reveals in order."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from datetime import UTC, datetime, timedelta
from itertools import count
from threading import Thread
from unittest.mock import Mock

import pyarrow as pa
import pytest

from tailrace.analysis.blind.withholding import WITHHELD, withhold
from tailrace.analysis.circuits.documents import describe_node
from tailrace.analysis.circuits.nodes import Kind, Node
from tailrace.pipeline import cli
from tailrace.pipeline.blind import study as blind_study
from tailrace.pipeline.blind.ledger import Ledger
from tailrace.pipeline.blind.sealed import seal
from tailrace.pipeline.blind.study import BlindStudy, begin_from_tables
from tailrace.storage.errors import ArtifactCorrupt, ArtifactMismatch, ArtifactMissing, SettingsError, StorageFull
from tailrace.storage.tables import write_table
from tests.support.tables_by_hand import dead_row, example_row, feature_row, publish_tables

PATHS = [
    {
        "notation": "mlp8tc[355]@-1 <- mlp0tc[9188]@37",
        "nodes": [
            {"kind": "feature", "layer": 8, "feature": 355, "token": ";", "token_id": 26, "position": 37},
            {"kind": "feature", "layer": 0, "feature": 9188, "token": ";", "contribution": 2.5},
            {"kind": "attention", "layer": 0, "head": 5, "label": "head on ' Leisman'", "contribution": 1.5},
        ],
        "prompt": "(Leisman, 1976;",
    }
]


def ticking():
    """Return a clock that goes on by a second each time it is read."""
    seconds = count()
    return lambda: datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC) + timedelta(seconds=next(seconds))


@pytest.fixture
def study(tmp_path):
    made = BlindStudy.begin(tmp_path / "study", {"site": "layer8", "feature": 355}, "blind", ticking())
    made.add("paths", PATHS, source="input", about="two paths")
    return made


# What is withheld


def test_every_word_of_a_text_is_withheld_whatever_key_it_has():
    seen = withhold(PATHS, mode="blind", source="input")
    assert seen[0]["notation"] == "mlp8tc[355]@-1 <- mlp0tc[9188]@37"
    assert seen[0]["prompt"] == WITHHELD
    assert seen[0]["nodes"][0] == {
        "kind": "feature", "layer": 8, "feature": 355, "token": WITHHELD, "token_id": WITHHELD, "position": 37,
    }  # fmt: skip
    assert seen[0]["nodes"][2]["label"] == WITHHELD
    assert not any(word in json.dumps(seen) for word in (";", "Leisman", "1976", "26"))


def test_numbers_and_names_of_parts_are_shown():
    content = {
        "kind": "head",
        "site": "layer3",
        "hook": "blocks.3.attn.hook_z[5]",
        "value": 1.5,
        "none": None,
        "on": True,
    }
    assert withhold(content, mode="blind", source="input") == content


@pytest.mark.parametrize("text", ["the 'cat'", "a cat", " cat"])
def test_a_text_under_a_name_s_key_is_withheld(text):
    assert withhold({"kind": text}, mode="blind", source="input") == {"kind": WITHHELD}


@pytest.mark.parametrize(
    "text",
    ["cat", " cat", "1976", "3.5", "cat: 5", "cat[", "@", "<-", "logit[262]", "embed['cat']@3", "mlp8tc[3]@1 cat"],
)
def test_words_and_numbers_alone_are_no_notation(text):
    for key in ("notation", "name", "text"):
        assert withhold({key: text}, mode="blind", source="input") == {key: WITHHELD}


@pytest.mark.parametrize("mode", ["blind", "super-blind"])
def test_a_circuit_is_shown_as_far_as_it_says_nothing_of_its_text(mode):
    """Every kind of node that circuits name, in the form in which they are written to circuit.json."""
    nodes = [
        Node(Kind.FEATURE, 8, 4, 355),
        Node(Kind.HEAD, 7, 2, 11),
        Node(Kind.EMBEDDING, None, 3),
        Node(Kind.POSITION, None, 3),
        Node(Kind.ERROR, 2, 4),
        Node(Kind.BIAS, of=Node(Kind.FEATURE, 8, 4, 355)),
    ]
    described = [describe_node(node) for node in nodes]
    assert withhold(described, mode=mode, source="input") == described
    path = {"text": "mlp8tc[355]@4: 21 <- attn7[11]@2: 3.6* <- embed0@2: -6e-07", "steps": []}
    assert withhold(path, mode=mode, source="input") == path
    layer_0 = describe_node(Node(Kind.FEATURE, 0, 4, 9188))
    assert withhold(layer_0, mode=mode, source="input") == (layer_0 if mode == "blind" else WITHHELD)
    logit = withhold(describe_node(Node(Kind.LOGIT, None, 4, 262)), mode=mode, source="input")
    assert (logit["index"], logit["name"]) == (WITHHELD, WITHHELD)
    tokens = withhold({"tokens": [{"id": 262, "text": " the"}]}, mode=mode, source="input")
    assert tokens == {"tokens": [{"id": WITHHELD, "text": WITHHELD}]}


def test_lists_of_token_ids_are_withheld_one_by_one():
    content = {"window_token_ids": [5, 6], "token_id_share": 0.5}
    assert withhold(content, mode="blind", source="input") == {
        "window_token_ids": [WITHHELD] * 2,
        "token_id_share": 0.5,
    }


def test_what_comes_from_weights_alone_is_shown_with_its_tokens():
    content = {"kind": "token", "token": " caught", "weight": 9.4, "layer": 0, "feature": 1636}
    assert withhold(content, mode="super-blind", source="weights") == content


def test_super_blind_withholds_which_features_of_layer_0_were_active():
    seen = withhold(PATHS, mode="super-blind", source="input")
    assert seen[0]["nodes"][0]["feature"] == 355
    assert seen[0]["nodes"][1] == WITHHELD
    assert seen[0]["nodes"][2]["head"] == 5  # a head of layer 0 is no feature
    assert seen[0]["notation"] == WITHHELD
    kept = {"feature": 3, "site": "layer10", "notation": "mlp10tc[3]@5", "layer": 10}
    assert withhold(kept, mode="super-blind", source="input") == kept
    assert withhold({"feature": 3, "site": "layer0"}, mode="super-blind", source="input") == WITHHELD


# The order of things


def test_nothing_is_revealed_before_a_hypothesis(study):
    with pytest.raises(SettingsError, match="nothing is revealed before a hypothesis"):
        study.reveal()
    with pytest.raises(SettingsError, match="a verdict comes after the reveal"):
        study.conclude("right")
    assert study.view(1)[0]["prompt"] == WITHHELD
    study.hypothesise("semicolons between references")
    assert study.view(1)[0]["prompt"] == WITHHELD
    study.reveal()
    assert study.view(1) == PATHS


def test_a_hypothesis_after_the_reveal_is_refused(study):
    study.hypothesise("one")
    study.hypothesise("another")
    study.reveal()
    with pytest.raises(SettingsError, match="a hypothesis now would be none"):
        study.hypothesise("a third")
    study.conclude("partly right", "the second")
    assert [entry["text"] for entry in study.entries() if entry["event"] == "hypothesis"] == ["one", "another"]


def test_every_view_is_on_file_with_its_time_and_whether_it_was_open(study):
    study.add("connections", [{"token": "a"}], source="weights")
    study.view(1)
    study.hypothesise("one")
    study.reveal()
    study.view(2)
    views = [entry for entry in study.entries() if entry["event"] == "view"]
    assert [(one["evidence"], one["kind"], one["revealed"]) for one in views] == [
        (1, "paths", False), (2, "connections", True),
    ]  # fmt: skip
    (reveal,) = [entry for entry in study.entries() if entry["event"] == "reveal"]
    assert reveal["viewed"] == [1]
    times = [entry["time"] for entry in study.entries()]
    assert times == sorted(times)
    assert times[0] == "2026-01-02T03:04:05.000+00:00"
    assert len(set(times)) == len(times)


def test_the_evidence_itself_cannot_be_read_in_passing(study):
    text = "".join(path.read_text() for path in study.directory.iterdir())
    assert "Leisman" not in text
    assert "two paths" in text


def test_bad_uses_are_told(study):
    with pytest.raises(SettingsError, match=r"has no evidence 2; there is 1 \(paths\)"):
        study.view(2)
    with pytest.raises(SettingsError, match="source 'text': wanted input or weights"):
        study.add("x", {}, source="text")
    with pytest.raises(SettingsError, match="the hypothesis is empty"):
        study.hypothesise("  ")
    with pytest.raises(SettingsError, match="outcome 'maybe': wanted right, partly right, wrong"):
        study.conclude("maybe")
    with pytest.raises(ArtifactMismatch, match="begun here already"):
        BlindStudy.begin(study.directory, {}, "blind")
    with pytest.raises(ArtifactMissing, match="blind study begin` starts one"):
        BlindStudy(study.directory / "elsewhere").entries()


# The ledger


def lines(study):
    return (study.directory / "ledger.jsonl").read_bytes().splitlines(keepends=True)


def rewrite(study, changed):
    (study.directory / "ledger.jsonl").write_bytes(b"".join(changed))


@pytest.mark.parametrize("change", ["edit", "remove", "swap", "insert"])
def test_a_changed_ledger_is_noticed_at_the_line(study, change):
    study.note("first")
    study.note("second")
    there = lines(study)
    if change == "edit":
        there[2] = there[2].replace(b"first", b"FIRST")
    elif change == "remove":
        del there[2]
    elif change == "swap":
        there[2], there[3] = there[3], there[2]
    else:
        there.insert(2, there[1])
    rewrite(study, there)
    with pytest.raises(ArtifactCorrupt, match=r"line 3 does not follow"):
        study.entries()
    with pytest.raises(ArtifactCorrupt):
        study.note("third")


def test_an_entry_that_a_killed_process_left_half_written_never_happened(study):
    before = study.entries()
    with (study.directory / "ledger.jsonl").open("ab") as file:
        file.write(b'{"event": "hyp')
    assert study.entries() == before
    study.note("on")
    assert [entry["event"] for entry in study.entries()] == ["begin", "evidence", "note"]
    assert study.entries()[-1]["previous"] == before[-1]["hash"]


def test_evidence_that_was_exchanged_is_noticed(study):
    other = BlindStudy.begin(study.directory / "other", {}, "blind")
    other.add("paths", [], source="input")
    (study.directory / "evidence-0001.sealed").write_bytes((other.directory / "evidence-0001.sealed").read_bytes())
    with pytest.raises(ArtifactCorrupt, match="is not what was sealed"):
        study.view(1)
    assert [entry["event"] for entry in study.entries()] == ["begin", "evidence"]


def test_evidence_that_two_add_at_once_is_all_kept(study, monkeypatch):
    other = Thread(target=BlindStudy(study.directory).add, args=("paths", ["theirs"]), kwargs={"source": "weights"})

    def seal_late(path, content):
        monkeypatch.undo()
        other.start()
        other.join(0.2)  # it ends, unless it waits for the ledger's lock
        return seal(path, content)

    monkeypatch.setattr(blind_study, "seal", seal_late)
    study.add("paths", ["ours"], source="weights")
    other.join()
    assert [study.view(one.number) for one in study.evidence()[1:]] == [["ours"], ["theirs"]]


def test_a_file_system_without_locks_is_refused_by_name(tmp_path, monkeypatch) -> None:
    def refuse(*_) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StorageFull, match="its file system has no locks"):
        Ledger(tmp_path / "ledger.jsonl", ticking()).append("study", begins=True)


def test_entries_are_chained_from_the_first(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl", ticking())
    first, second = ledger.append("one", begins=True, value=1), ledger.append("two", value="ü")
    assert first["previous"] == "0" * 64
    assert second["previous"] == first["hash"]
    assert ledger.entries() == [first, second]


# From tables


@pytest.fixture
def tables(tmp_path):
    features = [dead_row(0), feature_row(1), feature_row(2, n_active=1)]
    path = publish_tables(tmp_path / "tables", features, [example_row(1), example_row(1, 1, 3.0)], layer=8)
    connections = {"feature": [1, 2], "kind": ["token", "token"], "token": [" in", " out"], "weight": [0.5, 0.25]}
    batch = pa.RecordBatch.from_pydict(connections)
    write_table(path / "connections.parquet", batch.schema, [batch])
    return path


def test_a_study_begins_with_what_tables_hold_of_its_feature(tables, tmp_path):
    made = begin_from_tables(tmp_path / "study", tables, feature=1, mode="blind")
    assert [(one.kind, one.source) for one in made.evidence()] == [
        ("activations", "input"), ("connections", "weights"), ("token effects", "weights"),
    ]  # fmt: skip
    first, second = made.view(1)
    assert (first["activation"], first["position"], first["window_activations"]) == (4.0, 11, [None, 4.0, 0.0])
    assert first["window_tokens"] == [WITHHELD] * 3
    assert second["rank"] == 1
    assert made.view(2) == [{"feature": 1, "kind": "token", "token": " in", "weight": 0.5}]
    assert made.view(3)["promoted_tokens"] == [" up"]


def test_a_study_begins_whole_or_not_at_all(tables, tmp_path, monkeypatch):
    killed = tmp_path / f".study.tmp-{os.uname().nodename}-{2**22 + 1}-1"  # beyond the largest process id
    killed.mkdir()
    (killed / "ledger.jsonl").write_text("half")
    monkeypatch.setattr(BlindStudy, "add", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        begin_from_tables(tmp_path / "study", tables, feature=1, mode="blind")
    monkeypatch.undo()
    assert not (tmp_path / "study").exists()
    begin_from_tables(tmp_path / "study", tables, feature=1, mode="blind")
    assert {path.name for path in tmp_path.iterdir()} == {"study", "tables"}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    with pytest.raises(ArtifactMismatch, match="full: something lies here already"):
        begin_from_tables(tmp_path / "full", tables, feature=1, mode="blind")


def test_a_random_study_is_of_a_live_feature_and_an_unknown_one_is_refused(tables, tmp_path):
    made = begin_from_tables(tmp_path / "study", tables, feature=None, mode="super-blind", seed=5)
    assert made.entries()[0]["subject"]["feature"] == 1  # the others are dead or fire on too few rows
    assert made.mode == "super-blind"
    with pytest.raises(SettingsError, match="'3' is beyond the last feature, 2"):
        begin_from_tables(tmp_path / "other", tables, feature=3, mode="blind")


def test_the_commands_of_a_study(tables, tmp_path, capsys):
    place = str(tmp_path / "study")
    cli.main(["blind", "study", "begin", place, "--tables", str(tables), "--feature", "1"])
    (tmp_path / "path.json").write_text(json.dumps(PATHS))
    cli.main(["blind", "study", "add", place, str(tmp_path / "path.json"), "--kind", "paths", "--source", "input"])
    capsys.readouterr()
    cli.main(["blind", "study", "view", place, "4"])
    assert json.loads(capsys.readouterr().out)[0]["prompt"] == WITHHELD
    with pytest.raises(SystemExit):
        cli.main(["blind", "study", "reveal", place])
    assert "nothing is revealed before a hypothesis" in capsys.readouterr().err
    cli.main(["blind", "study", "hypothesis", place, "semicolons"])
    cli.main(["blind", "study", "reveal", place])
    cli.main(["blind", "study", "verdict", place, "right"])
    cli.main(["blind", "study", "log", place])
    log = capsys.readouterr().out
    assert "hypothesis: semicolons" in log
    assert "viewed evidence 4 (paths)" in log
    assert "verdict: right" in log
