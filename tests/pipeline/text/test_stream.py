import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tailrace.pipeline.text.stream
from tailrace.pipeline.text.columns import Column
from tailrace.pipeline.text.stream import DocumentStream, TextExamples
from tailrace.storage.errors import TextError
from tests.support.quick import quick
from tests.support.text_files_written import open_text, texts_of, write_jsonl, write_texts


def three_files(folder):
    for number, n in enumerate((30, 1, 19)):
        write_texts(folder / f"{number}.jsonl", n, start=100 * number)
    return folder


def indices(stream, state=None):
    return [document.index for document in stream.read_from(state)]


def test_index_is_the_position_in_the_dataset_also_when_shuffled(tmp_path):
    in_order = texts_of(open_text(three_files(tmp_path)))
    shuffled = list(open_text(tmp_path, shuffle_window=16))
    assert [document.index for document in shuffled] != list(range(50))
    assert all(document.text == in_order[document.index] for document in shuffled)


def test_shuffle_permutes_within_windows(tmp_path):
    order = indices(open_text(three_files(tmp_path), shuffle_window=16))
    assert [sorted(order[start : start + 16]) for start in (0, 16, 32, 48)] == [
        list(range(start, min(start + 16, 50))) for start in (0, 16, 32, 48)
    ]
    assert order[:16] != list(range(16))
    assert [place - 16 for place in order[16:32]] != order[:16]  # every window has a permutation of its own


def test_seed_alone_decides_the_order(tmp_path):
    three_files(tmp_path)
    orders = [indices(open_text(tmp_path, shuffle_window=32, seed=seed)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_long_documents_end_a_window_early_but_not_below_its_minimum(tmp_path, monkeypatch):
    monkeypatch.setattr(tailrace.pipeline.text.stream, "WINDOW_CHARACTERS", 200)
    order = indices(open_text(three_files(tmp_path), shuffle_window=1000))
    # "document 0" … "document 9" have 10 characters, the others 11: 10·10 + 9·11 = 199, so the twentieth passes 200.
    assert sorted(order[:20]) == list(range(20))
    monkeypatch.setattr(tailrace.pipeline.text.stream, "WINDOW_CHARACTERS", 1)
    order = indices(open_text(tmp_path, shuffle_window=1000))
    assert sorted(order[:16]) == list(range(16))


def parquet(folder):
    table = pa.table({"tokens": [[n] * (n % 4) for n in range(50)]})
    pq.write_table(table, folder / "a.parquet", row_group_size=7)
    return folder / "a.parquet"


def lines(folder):
    (folder / "a.txt").write_text("".join(f"line {n}\n" for n in range(30)))
    (folder / "b.txt").write_text("".join(f"line {n}\n" for n in range(20)))
    return folder


@pytest.mark.parametrize(
    ("make", "settings"),
    [(three_files, {}), (parquet, {}), (lines, {"text_unit": "line"})],
    ids=["jsonl", "parquet", "txt"],
)
@pytest.mark.parametrize("shuffle_window", quick([0, 16, 10_000], 16))
def test_resumes_exactly_at_every_state(tmp_path, monkeypatch, make, settings, shuffle_window):
    monkeypatch.setattr(tailrace.pipeline.text.stream, "UNSHUFFLED_BLOCK", 7)
    path = make(tmp_path)

    def fresh():
        return open_text(path, shuffle_window=shuffle_window, **settings)

    reader = fresh().read_from(None)
    states, documents = [json.dumps(reader.state)], []
    for document in reader:
        documents.append(document)
        states.append(json.dumps(reader.state))
    assert sorted(document.index for document in documents) == list(range(50))
    for n, state in enumerate(states):
        assert list(fresh().read_from(json.loads(state))) == documents[n:], f"after document {n}"


def test_one_stream_may_be_read_again_from_any_state(tmp_path):
    stream = open_text(three_files(tmp_path), shuffle_window=16)
    reader = stream.read_from(None)
    first = [next(reader) for _ in range(20)]
    state = reader.state
    rest = list(reader)
    assert list(stream.read_from(state)) == rest
    assert list(stream) == first + rest


def test_upcoming_indices_are_not_taken(tmp_path):
    reader = open_text(three_files(tmp_path), shuffle_window=16).read_from(None)
    upcoming = reader.upcoming_indices(5)
    assert [next(reader).index for _ in range(5)] == upcoming
    assert reader.upcoming_indices(100) == [document.index for document in reader][:11]


class FlakyExamples:
    """A dataset of ``n`` examples that fails before chosen ones, once for each error in its list."""

    def __init__(self, n, failures):
        self.n = n
        self.failures = {index: list(errors) for index, errors in failures.items()}
        self.loaded = {"at": 0}
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.loaded = dict(state)

    def __iter__(self):
        self.at = self.loaded["at"]
        while self.at < self.n:
            if self.failures.get(self.at):
                raise self.failures[self.at].pop(0)
            self.at += 1
            yield {"text": f"document {self.at - 1}"}


def flaky_stream(n, failures, waits, shuffle_window=16):
    examples = TextExamples("corpus", FlakyExamples(n, failures), None, waits.append)
    return DocumentStream(examples, Column("text", "text"), {}, shuffle_window=shuffle_window, seed=0)


def test_transient_failures_are_waited_out_without_losing_a_document():
    waits: list[float] = []
    failures = {0: [TimeoutError()], 20: [ConnectionError("reset"), ConnectionError("reset")], 49: [OSError("torn")]}
    documents = list(flaky_stream(50, failures, waits))
    assert documents == list(flaky_stream(50, {}, []))
    assert waits == [1.0, 1.0, 2.0, 1.0]


def test_stream_that_keeps_failing_says_that_progress_is_kept():
    waits: list[float] = []
    stream = flaky_stream(50, {20: [ConnectionError("reset by peer")] * 10}, waits)
    said = "reading failed 6 times at document 20 .*reset by peer.*is kept: run the same command again"
    with pytest.raises(TextError, match=said):
        list(stream)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0]


def test_reading_goes_on_after_a_lost_stream():
    stream = flaky_stream(50, {20: [ConnectionError("reset")] * 6}, [])
    reader = stream.read_from(None)
    documents = [next(reader) for _ in range(16)]
    with pytest.raises(TextError):
        next(reader)
    documents += list(stream.read_from(reader.state))
    assert documents == list(flaky_stream(50, {}, []))


def test_missing_file_is_not_waited_for(tmp_path):
    path = write_texts(tmp_path / "a.jsonl", 3)
    stream = open_text(path)
    path.unlink()
    with pytest.raises(TextError, match=re.escape("a.jsonl: cannot be read at document 0")):
        list(stream)


def test_a_reader_left_for_a_newer_one_refuses_to_go_on(tmp_path):
    stream = open_text(three_files(tmp_path), shuffle_window=16)
    old = stream.read_from(None)
    stream.read_from(None)
    with pytest.raises(AssertionError, match="another reader"):
        next(old)


def test_empty_text_is_a_document(tmp_path):
    assert texts_of(open_text(write_jsonl(tmp_path / "a.jsonl", [{"text": ""}, {"text": "a"}]))) == ["", "a"]
