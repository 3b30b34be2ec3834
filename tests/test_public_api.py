"""``import tailrace``: the names it has, what it loads for them, and that a keyword is the flag of the same name."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

import tailrace
from tailrace import circuits
from tailrace.pipeline import api, cli
from tailrace.pipeline.cache import stage as cache_stage
from tailrace.pipeline.circuit import stage as circuit_stage
from tailrace.pipeline.evaluate import stage as evaluate_stage
from tailrace.storage.artifact import REQUEST
from tailrace.storage.errors import ActionableError
from tailrace.training.loop.settings import SparseConnection, TrainSettings
from tests.support.synthetic_cache import hashed_rows, write_synthetic_cache

TRAIN: dict[str, Any] = {
    "architecture": "topk",
    "k": 3,
    "d_sae": 16,
    "steps": 4,
    "batch_rows": 64,
    "lr": 1e-3,
    "threads": 1,
}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in TRAIN.items()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache, and a transcoder and its tables as the commands make them."""
    place = tmp_path_factory.mktemp("public")
    write_synthetic_cache(place / "cache", rows=hashed_rows(8))
    command("train", place / "cache", "--out", place / "by-flags", *FLAGS)
    command(
        "analyze", place / "by-flags", "--cache", place / "cache", "--out", place / "tables-by-flags", "--rows", 64,
        "--examples", 3, "--without-model", "--threads", 1
    )  # fmt: skip
    return place


def command(*arguments: object) -> None:
    cli.cli.main([*map(str, arguments), "--quiet"], standalone_mode=False)


def same_request(one: Path, other: Path) -> bool:
    return (one / REQUEST).read_bytes() == (other / REQUEST).read_bytes()


def test_all_is_at_most_32_names_and_every_one_of_them_is_there_and_documented() -> None:
    assert len(tailrace.__all__) <= 32
    assert list(tailrace.__all__) == sorted(set(tailrace.__all__))
    assert set(tailrace.__all__) <= set(dir(tailrace))
    for name in tailrace.__all__:
        assert (inspect.getdoc(getattr(tailrace, name)) or "").strip(), name
    for name in circuits.__all__:
        assert inspect.getdoc(getattr(circuits, name)), name


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert tailrace.__version__ == project["version"]


def test_what_type_checkers_read_is_what_is_loaded() -> None:
    (checked,) = (
        node
        for node in ast.parse(Path(tailrace.__file__).read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    names: dict[str, str] = {}
    for node in checked.body:
        assert isinstance(node, ast.ImportFrom)
        names |= {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    assert sorted(names) == list(tailrace.__all__)
    for name, dotted in names.items():
        module = import_module(dotted.rpartition(".")[0])
        assert getattr(tailrace, name) is getattr(module, name)


def test_importing_loads_no_library_and_asking_tables_no_torch(place: Path) -> None:
    heavy = (
        "('torch', 'datasets', 'transformers', 'transformer_lens', 'duckdb', 'pyarrow', 'numpy', 'pydantic', 'click')"
    )
    program = (
        "import sys, tailrace\n"
        f"assert not [name for name in {heavy} if name in sys.modules]\n"
        f"assert len(tailrace.query('SELECT 1 FROM features', {str(place / 'tables-by-flags')!r})) == 16\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_name_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'trian'; it has .*train"):
        _ = tailrace.trian  # type: ignore[attr-defined]


def test_keywords_are_the_flags_of_the_same_names(place: Path) -> None:
    trained = tailrace.train(str(place / "cache"), out=str(place / "by-keywords"), **TRAIN)
    assert same_request(place / "by-flags", trained.path)
    assert repr(trained).startswith(f"TrainResult({str(trained.path)!r}, steps=4, fvu=")
    weights = [(folder / "weights.safetensors").read_bytes() for folder in (place / "by-flags", trained.path)]
    assert weights[0] == weights[1]


def test_a_path_a_string_and_nested_settings_make_the_same_artifact(place: Path) -> None:
    nested: dict[str, Any] = {**TRAIN, "architecture": {"kind": "topk", "k": 3}, "steps": "4"}
    del nested["k"]
    first = tailrace.train(place / "cache", out=place / "by-path", **nested)
    assert same_request(place / "by-flags", first.path)
    again = tailrace.train(cache=str(place / "cache"), out=str(place / "by-path"), **TRAIN)  # finished: returned
    assert again == first


def test_a_file_of_settings_counts_and_keywords_override_it(place: Path) -> None:
    (place / "run.yaml").write_text(
        "architecture: {kind: topk, k: 5}\nd_sae: 16\nsteps: 4\nbatch_rows: 64\nlr: 0.001\n"
    )
    tailrace.train(place / "cache", out=place / "by-file", config=str(place / "run.yaml"), k=3, threads=1)
    assert same_request(place / "by-flags", place / "by-file")


def test_a_sweep_is_the_commands(place: Path) -> None:
    command("train", place / "cache", "--out", place / "sweep-flags", *FLAGS, "--sweep", "k=2,4", "--sweep", "lr=1e-3")
    given = {name: value for name, value in TRAIN.items() if name not in ("k", "lr")}
    swept = tailrace.sweep(place / "cache", over={"k": [2, 4], "lr": [1e-3]}, out=place / "sweep", **given)
    assert same_request(place / "sweep-flags", swept.path)
    assert [run.name for run in swept.runs] == ["k=2,lr=0.001", "k=4,lr=0.001"]
    listed = tailrace.sweep(
        place / "cache", over=[{"k": 2, "lr": 1e-3}, {"k": 4, "lr": 1e-3}], out=place / "sweep", **given
    )
    assert listed == swept
    assert tailrace.query("SELECT k FROM runs ORDER BY k", swept.path).to_pydict() == {"k": [2, 4]}


def test_tables_are_the_commands_and_come_as_arrow_and_pandas(place: Path) -> None:
    arguments: dict[str, Any] = {"rows": 64, "examples": 3, "without_model": True, "threads": 1}
    made = tailrace.analyze(place / "by-flags", cache=str(place / "cache"), out=place / "tables", **arguments)
    assert same_request(place / "tables-by-flags", made.path)
    answer = tailrace.query(
        "SELECT a.feature FROM a.features a WHERE a.feature < $n ORDER BY 1", {"a": str(made.path)}, {"n": 2}
    )
    assert isinstance(answer, pa.Table)
    assert answer.to_pydict() == {"feature": [0, 1]}


def test_a_list_of_transcoders_gives_a_list_of_results_and_a_folder_alone_is_refused(place: Path) -> None:
    arguments: dict[str, Any] = {"cache": place / "cache", "rows": 64, "without_model": True, "threads": 1}
    (made,) = tailrace.analyze([place / "by-flags"], out=place / "each", **arguments)
    assert made.path == place / "each" / "by-flags"
    with pytest.raises(tailrace.SettingsError, match="give it in a list"):
        tailrace.analyze(place, out=place / "each", **arguments)


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        (lambda cache, out: tailrace.train(cache, out=out, d_sea=16), "d_sea: is no setting; did you mean d_sae?"),
        (lambda cache, out: tailrace.train(cache, out=out, dataset="text"), "dataset: only with live"),
        (lambda cache, out: tailrace.train(out=out, k=3), "train on a cache, or live"),
        (lambda cache, out: tailrace.train(cache, out=out, k=3, steps=0.5), "steps: .*not a whole number"),
        (lambda cache, out: tailrace.sweep(cache, out=out, over={"kk": [1]}), "kk: is no setting of `pipeline train`"),
        (lambda cache, out: tailrace.sweep(cache, out=out, over={}), "over: holds neither"),
        (lambda cache, out: tailrace.cache(out=out, modle="gpt2", dataset="x", tokens=1), "did you mean model"),
        (lambda cache, out: tailrace.analyze(cache, cache=cache, out=out, exmaples=1), "did you mean examples?"),
        (lambda cache, out: tailrace.evaluate(cache, cache=cache, out=out, sed=1), "did you mean seed?"),
        (lambda cache, out: tailrace.circuit("a", transcoders=cache, out=out, brunches=1), "did you mean branches?"),
        (lambda cache, out: tailrace.circuit("a", transcoders=cache, out=out), "explains one quantity"),
        (lambda cache, out: tailrace.query("SELECT x FROM features", cache), "has no tables"),
        (lambda cache, out: tailrace.info(out), "artifact lies here; check the path"),
        (lambda cache, out: tailrace.load_transcoder(cache), "cache"),
    ],
)
def test_what_is_wrong_is_refused_as_by_the_commands(call: Any, wanted: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(ActionableError, match=wanted):
        call(str(place / "cache"), str(tmp_path / "none"))
    assert list(tmp_path.iterdir()) == []


def test_text_models_paths_and_lists_of_layers_are_read_as_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    for stage in (cache_stage, evaluate_stage, circuit_stage):
        monkeypatch.setattr(stage, "run", lambda *settings, **others: given.append((settings, others)))
    monkeypatch.setattr("tailrace.pipeline.evaluate.command.show_scores", lambda _: [])
    cache, out = tmp_path / "cache", tmp_path / "out"
    command("cache", "--model", "m", "--dataset", cache, "--layers", "0,3", "--tokens", "1M", "--out", out)
    tailrace.cache(model=Path("m"), dataset=cache, layers=[0, 3], tokens=1_000_000, out=str(out))
    command("evaluate", cache, "--cache", cache, "--out", out, "--contexts", 3)
    tailrace.evaluate(str(cache), cache=str(cache), out=out, contexts=3)
    ask = ["--transcoders", cache, "--out", out, "--feature", "8:89", "--filter", "token!=9", "--filter", "kind=head"]
    command("circuit", "some text", *ask)
    filters = ["token!=9", "kind=head"]
    tailrace.circuit("some text", transcoders=[cache], out=out, feature=(8, 89), filter=filters)
    for typed, called in zip(given[::2], given[1::2], strict=True):
        assert typed[0] == called[0]
        others = [
            {name: list(value) if name in ("transcoders", "tables") else value for name, value in one[1].items()}
            for one in (typed, called)
        ]
        assert others[0] == others[1]


def test_transcoders_of_either_kind_are_loaded_and_two_of_one_site_are_told(place: Path, tmp_path: Path) -> None:
    assert tailrace.load_transcoder(place / "by-flags").encode(torch.zeros(2, 8)).shape == (2, 16)
    ((site, transcoder),) = tailrace.load_transcoders(str(place / "by-flags")).items()
    assert (site.name, transcoder.d_sae) == ("layer0", 16)
    with pytest.raises(tailrace.SettingsError, match=r"are both of site layer0; give one of them"):
        tailrace.load_transcoders([place / "by-flags", str(place / "by-flags")])


def test_a_home_folder_is_read_in_paths_where_no_shell_reads_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(place))
    assert tailrace.open_cache("~/cache").path == place / "cache"
    assert tailrace.load_transcoder("~/by-flags").d_sae == 16
    assert list(tailrace.load_transcoders(["~/by-flags"]))
    assert tailrace.verify("~/by-flags").passed
    assert tailrace.query("SELECT feature FROM features", "~/tables-by-flags").num_rows == 16
    assert tailrace.train("~/cache", out="~/by-flags", **TRAIN).path == place / "by-flags"  # finished: returned
    reference = {"connection_path": "~/by-flags", "connection_coefficient": 1.0}
    connected = TrainSettings.read({"connection": {"kind": "sparse", **reference}}).connection
    assert isinstance(connected, SparseConnection)
    assert connected.connection_path == place / "by-flags"


def test_verification_says_what_it_checked(place: Path) -> None:
    checked = tailrace.verify(str(place / "cache"), pairs=0)
    assert (checked.passed, checked.damage, checked.pairs) == (True, [], [])
    assert tailrace.verify(place / "by-flags").passed
    assert tailrace.info(place / "by-flags")["d_sae"] == 16


@pytest.mark.parametrize(
    ("flags", "keywords"),
    [
        ("lower --batch-rows 32, or give --rows, such as 100k", "lower batch_rows=32, or give rows, such as 100k"),
        ("--out=~/x: use --from PATH (--no-ignore-bos)", "out=~/x: use start_from=PATH (ignore_bos=False)"),
        ("run `pipeline cache --holdout 0.1` in /tmp/a--b", "run `pipeline cache --holdout 0.1` in /tmp/a--b"),
    ],
)
def test_errors_name_keywords_where_the_command_names_flags(flags: str, keywords: str) -> None:
    with pytest.raises(tailrace.SettingsError) as raised, api._speaking_of_keywords():
        raise tailrace.SettingsError(flags)
    assert str(raised.value) == keywords


def test_an_error_of_a_call_names_no_flag(tmp_path: Path) -> None:
    with pytest.raises(tailrace.SettingsError, match=r"^dataset: only with live; ") as raised:
        tailrace.analyze(tmp_path, cache=tmp_path, out=tmp_path / "out", dataset="text.jsonl")
    assert "--" not in str(raised.value)
