"""What reads inputs of users and strangers; each reader draws an input and reads it."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from tailrace.pipeline.cli import COMMANDS, cli
from tailrace.storage.artifact import MANIFEST, REQUEST, canonical_json, checksum_file
from tests.faults.inputs import Inputs, sealed, writable

Reader = Callable[[Inputs], object]
READERS: dict[str, Reader] = {}
"""Every reader by name: draws an input and reads it."""
RARE: dict[str, int] = {}
"""Readers that take long: one of so many inputs."""


def _reader(rarely: int = 1) -> Callable[[Reader], Reader]:
    def register(reader: Reader) -> Reader:
        READERS[name := reader.__name__.removeprefix("_")] = reader
        RARE[name] = rarely
        return reader

    return register


def run_command(*arguments: object) -> str:
    """Run a command line as ``pipeline`` does, but let its errors out; return what it prints."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        cli.main(args=[str(argument) for argument in arguments], prog_name="pipeline", standalone_mode=False)
        out.flush()
    return bytes(out.buffer.getvalue()).decode()


@_reader(8)
def _flags(inputs: Inputs) -> None:
    """Flags of any command that reads artifacts, which are not there."""
    names, command = inputs.random.choice(_commands())
    given = [part for parameter in command.params if parameter.required for part in _given(parameter, inputs, True)]
    others = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    for parameter in inputs.random.sample(others, min(len(others), inputs.random.randint(1, 3))):
        given += [] if parameter.required or parameter.is_eager else _given(parameter, inputs, False)
    if names == ["circuits-model"]:  # would fetch a model by itself
        given += ["--save-config", str(inputs.scratch("saved.yaml"))]
    run_command(*names, *given)


def _commands() -> list[tuple[list[str], click.Command]]:
    """Return every command with its names; without what serves, deletes, or looks for a model before its text."""
    if not _ALL:
        for name in COMMANDS.keys() - {"serve", "demo", "rm", "doctor"}:
            _ALL.extend(_below([name], cli.get_command(click.Context(cli), name)))  # type: ignore[arg-type]
        _ALL.sort(key=lambda one: one[0])
    return _ALL


_ALL: list[tuple[list[str], click.Command]] = []


def _below(names: list[str], command: click.Command) -> Iterator[tuple[list[str], click.Command]]:
    if not isinstance(command, click.Group):
        yield names, command
        return
    for name, inner in command.commands.items():
        yield from _below([*names, name], inner)


def _given(parameter: click.Parameter, inputs: Inputs, is_required: bool) -> list[str]:
    """Return an option as it is typed. Paths are of nothing, so that no command gets beyond its settings."""
    flag = parameter.opts[:1] if isinstance(parameter, click.Option) else []
    if getattr(parameter, "is_flag", False):
        return flag
    if isinstance(parameter.type, click.Path):
        path = inputs.scratch("nothing")
        return [*flag, inputs.random.choice([str(path), str(path), f"{path}/{'x' * 300}", f"{path}\udcff"])]
    choices = list(getattr(parameter.type, "choices", ())) or ["1", "0.5", "topk", "auto", "1e12", "1e9", "layer0:1"]
    values = [inputs.any_of(*map(str, choices)) for _ in range(max(1, parameter.nargs))]
    values = [value.replace("\0", "") for value in values]  # no command line can hold it
    return [*flag, *values] if flag or is_required else []


@_reader()
def _settings_file(inputs: Inputs) -> None:
    from tailrace.pipeline.shared.options import read_settings, setting_fields
    from tailrace.training.loop.settings import TrainSettings

    name = inputs.random.choice(list(setting_fields(TrainSettings)))
    good = "architecture:\n  kind: topk\n  k: 3\nsteps: 10\nlr: 1e-3\n"
    path = inputs.file("settings.yaml", inputs.any_of(good, f"{name}: {inputs.text(4)}\n", f"{name}: {inputs.text(2)}"))
    read_settings(TrainSettings, path, {})


@_reader()
def _request_as_settings(inputs: Inputs) -> None:
    from tailrace.pipeline.shared.options import read_settings
    from tailrace.training.loop.settings import TrainSettings

    artifact = inputs.world / "transcoders/topk"
    request = json.loads((artifact / REQUEST).read_bytes())
    changed = inputs.random.choice([_json(inputs.changed(request)), inputs.damaged(canonical_json(request))])
    with inputs.replaced(artifact / REQUEST, changed):
        read_settings(TrainSettings, artifact, {})


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode(errors="replace")


@_reader()
def _sweep(inputs: Inputs) -> None:
    from tailrace.pipeline.shared.options import read_settings, setting_fields
    from tailrace.pipeline.train.grid import expand, read_grid
    from tailrace.training.loop.settings import TrainSettings

    name = inputs.random.choice(list(setting_fields(TrainSettings)))
    lists = "k: [1, 2]\nlr: [1e-3]\n" if inputs.random.random() < 0.9 else _many_lists(setting_fields(TrainSettings))
    text = inputs.any_of(lists, "- {k: 2}\n- {k: 3, lr: 1e-3}\n", f"{name}: [{inputs.text(2)}]")
    flags = [inputs.any_of("k=16,32", f"{name}={inputs.text(3)}") for _ in range(inputs.random.randint(0, 2))]
    file = inputs.file("sweep.yaml", text) if inputs.random.random() < 0.7 else None
    expand(read_grid(flags, file)[:50], lambda point: read_settings(TrainSettings, None, dict(point)))


def _many_lists(names: Any) -> str:
    return "".join(f"{name}: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]\n" for name in list(names)[:9])


@_reader()
def _typed_texts(inputs: Inputs) -> None:
    """Features, layers, hooks, heads, holdouts, filters and values, by the functions that read the flags."""
    from tailrace.analysis.circuits.filters import NodeFilter
    from tailrace.pipeline.circuit.question import parse_feature
    from tailrace.pipeline.model.sites import resolve_sites
    from tailrace.pipeline.query.saved import saved_query
    from tailrace.pipeline.shared.feature_selection import parse_features, parse_layer_features
    from tailrace.pipeline.text.holdout import HoldoutRule

    hooks = ["blocks.0.mlp.hook_in", "blocks.0.mlp.hook_out", "blocks.0.attn.hook_z"]
    layers = {"layer0": 16, "layer1": 16}
    readers: list[Callable[[], object]] = [
        lambda: parse_features([inputs.any_of("89,100-200", "1")], 32),
        lambda: parse_layer_features([inputs.any_of("layer0:1", "1:3-5")], layers),
        lambda: parse_feature(inputs.any_of("8:89")),
        lambda: NodeFilter.parse([inputs.any_of("token!=9", "layer<8", "kind=head")]),
        lambda: HoldoutRule.parse(inputs.any_of("7::20", "0.01", "3,17,40:50")).is_candidate(5, None, limited=True),
        lambda: saved_query("feature").values([inputs.any_of("feature=89")]),
        lambda: resolve_sites(
            inputs.random.choice([None, inputs.any_of("0,3,8-11", "all")]),
            [inputs.any_of("x=blocks.0.mlp.hook_in:blocks.0.mlp.hook_out", "blocks.0.attn.hook_z[5]")],
            n_layers=2,
            hook_names=hooks,
            count_heads=lambda names: dict.fromkeys(names, 4),
        ),
    ]
    inputs.random.choice(readers)()


@_reader()
def _steering(inputs: Inputs) -> None:
    from tailrace.pipeline.steer.settings import SteerSettings

    feature, nodes = inputs.any_of("1:3=+30", "0:1=off"), inputs.any_of("10=off", "1:3@2=0")
    assert SteerSettings.read({"feature": [feature], "nodes": [nodes]}).assignments is not None


@_reader()
def _prompts(inputs: Inputs) -> None:
    from tailrace.pipeline.score.stage import read_texts
    from tailrace.pipeline.task.prompts import read_lines

    line = {"prompt": "a b", "correct": ["a"], "incorrect": ["b"]}
    path = inputs.jsonl("prompts.jsonl", line, line)
    read_lines(path) if inputs.random.random() < 0.5 else read_texts([inputs.text(1)], [path])


@_reader(4)
def _labels(inputs: Inputs) -> None:
    from tailrace.pipeline.label.stage import import_labels

    line = {"feature": 3, "label": "x", "note": "", "site": "layer1", "starred": True}
    path = inputs.jsonl("labels.jsonl", line, line)
    if inputs.random.random() < 0.4:
        path = inputs.file("labels.csv", inputs.any_of("feature,label,starred\n3,x,true\n", 'feature,label\n"3,x\n'))
    tables = inputs.world / "tables/topk"
    try:
        import_labels(tables, path, author="a")
    finally:
        for own in tables.glob("labels*"):
            own.unlink()


@_reader(12)
def _text_files(inputs: Inputs) -> None:
    from tailrace.pipeline.text.dataset import open_documents
    from tailrace.pipeline.text.settings import TextSettings

    kind = inputs.random.choice(["jsonl", "json", "txt", "csv", "parquet"])
    path = inputs.file(f"text.{kind}", b"")
    if kind == "parquet":
        pq.write_table(pa.table({"text": _column(inputs)}), path)
        path.write_bytes(inputs.random.choice([path.read_bytes(), inputs.damaged(path.read_bytes())]))
    elif kind == "csv":
        path = inputs.file("text.csv", inputs.any_of("id,text\n1,a b\n2,c\n", 'text\n"a\n'))
    else:
        path = inputs.jsonl(f"text.{kind}", {"text": writable(inputs.text(3))}, {"text": "a b c"})
    list(itertools.islice(open_documents(TextSettings.read({"dataset": str(path)}), 0).read_from(None), 5))


def _column(inputs: Inputs) -> pa.Array:
    """Return a column of any type that Parquet has."""
    columns = [
        pa.array(["a b", None, writable(inputs.text(2))]),
        pa.array([[1, 2], [], None]),
        pa.array([b"\xff", b"a"]),
        pa.array([{"a": 1}]),
        pa.array([1.5, float("nan")]),
        pa.array([0, 2**62], pa.timestamp("us")),
        pa.array([], pa.string()),
        pa.array([["a", "b"], [None]]),
    ]
    column: pa.Array = inputs.random.choice(columns)
    return column


@_reader(8)
def _attached_files(inputs: Inputs) -> None:
    """Files that a query sees as views, and the answers that it writes."""
    kind = inputs.random.choice(["jsonl", "json", "csv", "parquet"])
    if kind == "parquet":
        path = inputs.scratch("own.parquet")
        # by DuckDB: it writes types that Arrow does not read
        value = inputs.random.choice(_SQL_VALUES)
        with contextlib.suppress(duckdb.Error):
            duckdb.sql(f"COPY (SELECT {value} AS a) TO '{path}' (FORMAT parquet)")
    elif kind == "csv":
        path = inputs.file("own.csv", inputs.any_of("a,b\n1,infinity\n2,2001-01-01\n", "a,a\n1,2\n", "a,A\n1,2\n"))
    else:
        path = inputs.jsonl(f"own.{kind}", {"a": 1, "b": [1]}, {"a": "x"})
    form = inputs.random.choice(["table", "csv", "json", "parquet"])
    sql = inputs.random.choice(["SELECT * FROM own", "SELECT a, a FROM own", "FROM own LIMIT 1"])
    run_command("query", sql, "--tables", inputs.world / "tables/topk", "--attach", f"own={path}", "--format", form)


_SQL_VALUES: tuple[Any, ...] = (
    *("INTERVAL 1 MONTH", "'infinity'::TIMESTAMP", "'a'::UNION(n INT, t VARCHAR)", "1::HUGEINT", "MAP {'a': 1}"),
    *("'101'::BIT", "uuid()", "'12:00'::TIMETZ", "[NULL]", "'-infinity'::DATE", "'0000-01-01'::DATE", "'a\\xff'::BLOB"),
    *("'290000-01-01'::TIMESTAMPTZ", "1::DECIMAL(38,37)", "{'a': INTERVAL 1 DAY}", "'24:00'::TIME", "'nan'::FLOAT"),
)
"""Of all types that DuckDB writes to Parquet."""


@_reader(3)
def _queries(inputs: Inputs) -> None:
    sql = inputs.any_of(
        "SELECT feature FROM features LIMIT 3", "SELECT $x", "SELECT count(*) FROM features WHERE feature < $x",
        f"SELECT {inputs.random.choice(_SQL_VALUES)}", "SELECT * FROM glob('/etc/*')", "DESCRIBE features",
    )  # fmt: skip
    tables = inputs.any_of(f"a={inputs.world}/tables/topk", f"{inputs.world}/tables/topk").replace("\0", "")
    form = inputs.random.choice(["table", "csv", "json"])
    run_command("query", sql, "--tables", tables, "--set", f"x={inputs.text(2)}", "--format", form)


@_reader()
def _folder_names(inputs: Inputs) -> None:
    from tailrace.pipeline.artifacts.folders import each_artifact

    folder = inputs.scratch("folder")
    folder.mkdir()
    for _ in range(2):
        name = writable(inputs.text(2)).replace("/", "").replace("\0", "")[:60]
        with contextlib.suppress(OSError, ValueError):
            (folder / name).mkdir()
            shutil.copy(inputs.world / "transcoders/topk" / MANIFEST, folder / name / MANIFEST)
    each_artifact([folder], "transcoder")
    run_command(inputs.random.choice(["ls", "info"]), folder)


@_reader(2)
def _manifests(inputs: Inputs) -> None:
    with inputs.resealed() as path:
        run_command(*inputs.random.choice([("info", path), ("info", "--json", path), ("ls", path), ("verify", path)]))


@_reader(12)
def _opened_artifacts(inputs: Inputs) -> None:
    """What commands read of an artifact before they load a model."""
    from tailrace.pipeline.artifacts.transcoders import open_transcoders
    from tailrace.pipeline.circuit.stage import read_result as read_circuit
    from tailrace.pipeline.dashboard.site_data import SiteData  # noqa: F401 - imported with the rest of the command
    from tailrace.pipeline.steer.changes import read_circuit as read_nodes
    from tailrace.storage.activation_cache import open_cache

    def use_cache(path: Path) -> None:
        split = open_cache(path).split("train")
        if split.n_rows < 10**6:
            split.output_statistics()
            for unit in range(min(2, split.n_units)):
                split.read_unit(unit, ["layer0/in", "document"])

    uses: dict[str, list[Callable[[Path], object]]] = {
        "transcoder": [lambda path: [one.load() for one in open_transcoders(path)]],
        "cross-layer-transcoder": [lambda path: [one.load() for one in open_transcoders(path)]],
        "tables": [
            lambda path: run_command("query", "SELECT count(*) FROM features", "--tables", path),
            lambda path: run_command("label", path, "--list"),
        ],
        "sweep": [
            lambda path: run_command("query", "FROM runs", "--tables", path),
            lambda path: run_command("pareto", path, "--out", inputs.folder / "pareto.html"),
        ],
        "evaluation": [lambda path: run_command("pareto", path, "--out", inputs.folder / "pareto.html")],
        "circuit": [read_circuit, read_nodes],
        "activation-cache": [use_cache],
    }
    kind = inputs.random.choice(
        [kind for kind in uses if any(one["kind"] == kind for one in inputs.manifests.values())]
    )
    with inputs.resealed(kind) as path:
        inputs.random.choice(uses[kind])(path)


@_reader(2)
def _json_files(inputs: Inputs) -> None:
    """Any JSON file of an artifact or a draft, damaged."""
    name = inputs.random.choice([*inputs.manifests, "drafts/transcoder", "drafts/cache", "drafts/sweep"])
    files = sorted(path for path in (inputs.world / name).rglob("*.json") if path.stat().st_size)
    file = inputs.random.choice(files)
    data = file.read_bytes()
    new = inputs.damaged(data) if inputs.random.random() < 0.5 else _json(inputs.changed(json.loads(data)))
    with inputs.replaced(file, new):
        command = inputs.random.choice(["info", "verify", "ls"])
        run_command(command, inputs.world / name)


@_reader(4)
def _records(inputs: Inputs) -> None:
    from tailrace.storage.activation_cache import open_cache
    from tailrace.storage.cache_verify import verify_bytes

    cache = inputs.world / "caches/float32-zstd"
    file = inputs.random.choice(sorted((cache / "commits/0").iterdir()))
    record = _json(inputs.changed(json.loads(file.read_bytes())))
    manifest = copy.deepcopy(inputs.manifests["caches/float32-zstd"])
    with inputs.replaced(file, record):
        name = str(file.relative_to(cache))
        manifest["files"][name] = {"bytes": len(record), "checksum": checksum_file(file)}
        manifest.pop("digest")
        with inputs.replaced(cache / MANIFEST, sealed(manifest)):
            verify_bytes(cache)
            split = open_cache(cache).split("train")
            split.merged_statistics(["layer0/in"])
            split.first_contexts()


@_reader()
def _run_logs(inputs: Inputs) -> None:
    run = inputs.world / inputs.random.choice(["transcoders/topk", "drafts/transcoder"])
    file = run / inputs.random.choice(["metrics.jsonl", "timing.jsonl"])
    lines = file.read_bytes().splitlines()
    at = inputs.random.randrange(len(lines))
    changed = inputs.random.choice([inputs.damaged(lines[at]), _json(inputs.changed(json.loads(lines[at])))])
    with inputs.replaced(file, b"\n".join([*lines[:at], changed, *lines[at + 1 :], b""])):
        line = inputs.random.choice([("curves", run), ("curves", run, "--json"), ("ls", run), ("info", run)])
        run_command(*line)


@_reader()
def _checkpoints(inputs: Inputs) -> None:
    from tailrace.training.loop.checkpoint import Checkpoints

    folder = inputs.world / "drafts/transcoder/checkpoints"
    file = min(folder.iterdir())
    with inputs.replaced(file, inputs.damaged(file.read_bytes())):
        Checkpoints(folder).load(int(file.stem))


@_reader()
def _weights(inputs: Inputs) -> None:
    from tailrace.pipeline.formats.foreign import read_tensors

    file = inputs.world / "transcoders/topk/weights.safetensors"
    read_tensors(inputs.file("own.safetensors", inputs.damaged(file.read_bytes())))


@_reader()
def _foreign_checkpoints(inputs: Inputs) -> None:
    from tailrace.pipeline.formats import dictionary_learning, reference

    buffer = io.BytesIO()
    torch.save({"cfg": {"a": 1}, "state_dict": {"W_enc": torch.zeros(3, 3)}}, buffer)
    path = inputs.folder / "own.pt"
    with zipfile.ZipFile(buffer) as read, zipfile.ZipFile(path, "w") as written:
        for name in read.namelist():
            data = read.read(name)
            written.writestr(name, _near_pickle(inputs, data) if name.endswith("data.pkl") else data)
    if inputs.random.random() < 0.7:
        reference.read(path)
    else:
        folder = inputs.folder / "dictionary"
        folder.mkdir(exist_ok=True)
        shutil.copy(path, folder / "ae.pt")
        (folder / "config.json").write_bytes(_json(_DICTIONARY))
        dictionary_learning.read(folder)


def _near_pickle(inputs: Inputs, data: bytes) -> bytes:
    content = bytearray(data)
    for _ in range(inputs.random.randint(1, 3)):
        at = inputs.random.randrange(len(content))
        choice = inputs.random.random()
        if choice < 0.5:
            content[at] = inputs.random.randrange(256)
        elif choice < 0.75:
            del content[at]
        else:
            content.insert(at, inputs.random.choice(b"RbcN}]KX(t.q\x85\x86h"))
    return bytes(content)


_DICTIONARY = {
    "trainer": {"dict_class": "AutoEncoderTopK", "k": 3, "submodule_name": "resid_post_layer_0", "lm_name": "x"}
}
_SPARSIFY = {
    "activation": "topk", "k": 3, "multi_topk": False, "skip_connection": False, "transcode": True, "d_in": 16,
    "num_latents": 32, "expansion_factor": 2, "normalize_decoder": True,
}  # fmt: skip
_TRACER = "model_name: x\nmodel_kind: transcoder_set\nfeature_input_hook: hook_in\nfeature_output_hook: hook_out\n"


@_reader()
def _foreign_settings(inputs: Inputs) -> None:
    """Configurations of other tools beside weights that are as they should be."""
    from tailrace.pipeline.formats import circuit_tracer, cross_layer, dictionary_learning, saelens, sparsify

    tensors = {
        "W_enc": torch.zeros(32, 16),
        "b_enc": torch.zeros(32),
        "W_dec": torch.zeros(32, 16),
        "b_dec": torch.zeros(16),
    }

    def config(name: str, good: Any) -> Path:
        data = _json(inputs.changed(good)) if inputs.random.random() < 0.8 else inputs.damaged(_json(good))
        return inputs.file(name, data).parent

    def of_saelens() -> None:
        name = inputs.random.choice(["saelens", "saelens-topk", "saelens-sae"])
        file = inputs.world / "exports" / name / "cfg.json"
        good = json.loads(file.read_bytes())
        with inputs.replaced(file, inputs.random.choice([_json(inputs.changed(good)), inputs.damaged(_json(good))])):
            saelens.read(file.parent).build(file.parent)

    def of_dictionary() -> None:
        folder = config("dictionary/config.json", _DICTIONARY)
        own = {
            "encoder.weight": torch.zeros(32, 16),
            "encoder.bias": torch.zeros(32),
            "decoder.weight": torch.zeros(16, 32),
        }
        torch.save({**own, "b_dec": torch.zeros(16)}, folder / "ae.pt")
        dictionary_learning.read(folder).build(folder)

    def of_sparsify() -> None:
        folder = config("h.0.mlp/cfg.json", _SPARSIFY)
        own = {"encoder.weight": tensors["W_enc"], "encoder.bias": tensors["b_enc"], "W_dec": tensors["W_dec"]}
        save_file({**own, "b_dec": tensors["b_dec"]}, folder / "sae.safetensors")
        sparsify.read(folder).build(folder)

    def of_tracer() -> None:
        folder = inputs.file("tracer/config.yaml", inputs.any_of(_TRACER, "a: &a [*a]\n")).parent
        save_file(tensors, folder / "layer_0.safetensors")
        circuit_tracer.read(folder / "layer_0.safetensors").build(folder)

    def of_layers() -> None:
        folder = inputs.world / "exports/cross-layer"
        file = folder / "config.yaml"
        with inputs.replaced(file, inputs.any_of(file.read_text()).encode(errors="surrogatepass")):
            cross_layer.read(folder).build(folder)

    inputs.random.choice([of_saelens, of_dictionary, of_sparsify, of_tracer, of_layers])()


@_reader(40)
def _models(inputs: Inputs) -> None:
    """Configuration, tokenizer and weights of a model, as they are opened before any layer is built."""
    from tailrace.pipeline.model.loading import check_kind, open_checkpoint
    from tailrace.pipeline.model.locations import folder_digest, loaded_files
    from tailrace.pipeline.model.tokenizer import open_tokenizer, read_stated_tokens

    folder = inputs.world / "model"
    file = folder / inputs.random.choice(
        ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    )
    data = file.read_bytes()
    new = inputs.damaged(data) if inputs.random.random() < 0.4 else _json(inputs.changed(json.loads(data)))
    index = folder / "model.safetensors.index.json"
    with inputs.replaced(file, new):
        if inputs.random.random() < 0.3:
            weights = folder / "model.safetensors"
            kept = weights.rename(folder / "kept")
            index.write_bytes(
                inputs.random.choice([inputs.damaged(b"{}"), _json(inputs.changed({"weight_map": {"a": "../x"}}))])
            )
            try:
                loaded_files(folder)
                folder_digest(folder)
            finally:
                index.unlink()
                kept.rename(weights)
        else:
            checkpoint = open_checkpoint(str(folder), None)
            check_kind(checkpoint)
            read_stated_tokens(checkpoint)
            open_tokenizer(checkpoint)


@_reader()
def _studies(inputs: Inputs) -> None:
    file = inputs.random.choice(sorted(path for path in (inputs.world / "blind").rglob("*") if path.is_file()))
    study, drawn = inputs.world / "blind/study", inputs.world / "blind/draw"
    with inputs.replaced(file, inputs.damaged(file.read_bytes())):
        if study in file.parents:
            run_command(
                "blind", "study", *inputs.random.choice([("log", study), ("view", study, inputs.random.randint(-1, 3))])
            )
        else:
            ratings = inputs.jsonl("ratings.json", {"0": 1, "1": 2})
            run_command("blind", "tally", drawn, "--ratings", ratings)


@_reader()
def _token_texts(inputs: Inputs) -> None:
    from tailrace.analysis.dashboards.values import visible_token
    from tailrace.storage.token_text import join_characters, text_of_bytes

    data = inputs.random.randbytes(inputs.random.randint(0, 12))
    cuts = sorted(inputs.random.randint(0, len(data)) for _ in range(3))
    parts = [data[start:end] for start, end in itertools.pairwise([0, *cuts, len(data)])]
    assert "".join(join_characters([text_of_bytes(part) for part in parts])) == text_of_bytes(data), parts
    visible_token(inputs.text(3))
