"""Hub datasets without a network: what the two libraries raise is put in by hand."""

from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tailrace.pipeline.text.dataset import open_documents
from tailrace.pipeline.text.files import looks_local
from tailrace.pipeline.text.settings import TextSettings
from tailrace.pipeline.text.stream import HTTP_ERROR, is_transient
from tailrace.storage.errors import TextError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hub_error(kind, status):
    """Build an error of the hub's without a request behind it."""
    error = kind.__new__(kind)
    Exception.__init__(error, f"status {status}")
    error.response = SimpleNamespace(status_code=status)
    return error


@pytest.fixture
def hub(monkeypatch):
    """A hub that answers from ``hub.commits`` and ``hub.opened``: values are returned, exceptions raised, in turn."""
    hub = SimpleNamespace(commits=[COMMIT], opened=[example_dataset()], asked=[], loaded=[], waits=[])

    def answer(answers: list[Any]) -> Any:
        value = answers.pop(0)
        if isinstance(value, BaseException):
            raise value
        return value

    def dataset_info(self, name, revision=None):
        hub.asked.append((name, revision))
        return SimpleNamespace(sha=answer(hub.commits))

    def load_dataset(name, config, **options):
        hub.loaded.append((name, config, options))
        return answer(hub.opened)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return hub


def example_dataset():
    rows = [{"text": f"document {n}", "url": "x"} for n in range(3)]
    return datasets.Dataset.from_list(rows).to_iterable_dataset()


def open_hub(hub, **settings):
    given = TextSettings(dataset="owner/corpus", shuffle_window=0, **settings)
    return open_documents(given, 0, sleep=hub.waits.append)


def test_hub_dataset_is_streamed_from_the_commit_that_is_recorded(hub):
    stream = open_hub(hub, dataset_revision="v2", dataset_config="en", split="test")
    assert hub.asked == [("owner/corpus", "v2")]
    assert hub.loaded == [("owner/corpus", "en", {"split": "test", "revision": COMMIT, "streaming": True})]
    assert [document.text for document in stream] == ["document 0", "document 1", "document 2"]
    assert stream.identity() == {
        "source": "hub",
        "dataset": "owner/corpus",
        "config": "en",
        "split": "test",
        "commit": COMMIT,
        "column": "text",
        "kind": "text",
        "shuffle_window": 0,
        "seed": 0,
    }


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OfflineModeIsEnabled("offline"), "hub cannot be reached.*network.*local .txt"),
        (hub_error(GatedRepoError, 403), "accept them on its page, log in with `hf auth login`"),
        (hub_error(RepositoryNotFoundError, 404), "no such dataset on the hub, and no such local file"),
        (hub_error(RevisionNotFoundError, 404), "has no revision 'v9'"),
    ],
)
def test_failure_to_find_a_dataset_says_the_next_step_at_once(hub, error, said):
    hub.commits = [error]
    with pytest.raises(TextError, match=said):
        open_hub(hub, dataset_revision="v9")
    assert hub.waits == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ValueError("Unknown split 'train'. Should be one of ['test']."),
            r"Should be one of .*\nCheck --dataset-config",
        ),
        (RuntimeError("Dataset scripts are no longer supported"), "scripts are no longer.*\n.*download its files"),
        (FileNotFoundError("no data files"), "no such dataset on the hub"),
    ],
)
def test_failure_to_open_a_dataset_says_the_next_step_at_once(hub, error, said):
    hub.opened = [error]
    with pytest.raises(TextError, match=said):
        open_hub(hub)
    assert hub.waits == []


def test_busy_hub_is_waited_for_while_opening(hub):
    hub.commits = [hub_error(HfHubHTTPError, 503), COMMIT]
    hub.opened = [ConnectionError("reset"), HTTP_ERROR("torn"), example_dataset()]
    assert len(list(open_hub(hub))) == 3
    assert hub.waits == [1.0, 1.0, 2.0]


def test_hub_that_stays_away_is_given_up_soon(hub):
    hub.commits = [ConnectionError("no route")] * 5
    with pytest.raises(TextError, match=r"hub cannot be reached \(no route\)"):
        open_hub(hub)
    assert hub.waits == [1.0, 2.0]


@pytest.mark.parametrize(
    ("error", "remote", "transient"),
    [
        (ConnectionError(), True, True),
        (TimeoutError(), False, True),
        (OSError(5, "input/output error"), False, True),
        (OSError("corrupt Snappy data"), False, False),  # pyarrow's way to say that bytes are damaged
        (OSError("torn"), True, True),
        (FileNotFoundError(), True, False),
        (PermissionError(), True, False),
        (OfflineModeIsEnabled(), True, False),
        (HTTP_ERROR("no route"), True, True),
        (hub_error(HfHubHTTPError, 429), True, True),
        (hub_error(HfHubHTTPError, 502), True, True),
        (hub_error(HfHubHTTPError, 403), True, False),
        (ValueError(), True, False),
    ],
    ids=repr,
)
def test_transient_means_that_waiting_may_help(error, remote, transient):
    assert is_transient(error, remote=remote) is transient


@pytest.mark.parametrize("name", ["owner/corpus", "wikitext", "owner/corpus.v2"])
def test_hub_names_are_not_taken_for_paths(name):
    assert not looks_local(name)


@pytest.mark.parametrize("name", ["./corpus", "/data", "~/x", "text.jsonl", "a/b.txt.gz", "a/*.parquet"])
def test_paths_are_not_taken_for_hub_names(name):
    assert looks_local(name)


def test_folder_that_exists_is_local(tmp_path, monkeypatch):
    (tmp_path / "corpus").mkdir()
    monkeypatch.chdir(tmp_path)
    assert looks_local("corpus")
