"""The functions of ``import tailrace``: the main commands as calls, with their flags as keywords.

A setting's keyword is its flag's name with ``_`` for ``-``, and is read by the code that reads the flag: ``k="32"``,
``k=32`` and ``--k 32`` are one setting, ``tokens="1M"`` is ``tokens=1_000_000``. ``config`` takes a file of settings
too. Nothing is printed; ``quiet=False`` shows progress. An error that a user can act on is an ``ActionableError``,
whose message names keywords where the command's names flags.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from numbers import Number
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_origin, overload

from tailrace.pipeline.artifacts.folders import PathLike, Paths, as_path, as_paths
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.shared.options import current_names, flat_values, read_settings, setting_fields
from tailrace.storage.errors import ActionableError, SettingsError
from tailrace.storage.settings import Settings

if TYPE_CHECKING:
    import pyarrow as pa

    from tailrace.pipeline.analyze.stage import AnalyzeResult
    from tailrace.pipeline.cache.stage import CacheResult
    from tailrace.pipeline.cache.verify import Verification
    from tailrace.pipeline.circuit.stage import CircuitResult
    from tailrace.pipeline.compare.stage import ComparisonResult
    from tailrace.pipeline.evaluate.stage import EvaluateResult
    from tailrace.pipeline.steer.stage import SteerResult
    from tailrace.pipeline.train.stage import TrainResult
    from tailrace.pipeline.train.sweep import SweepResult
    from tailrace.storage.generations import CachePath
    from tailrace.training.loop.curves import RunCurves
    from tailrace.training.loop.loggers import Logger

Read = TypeVar("Read", bound=Settings)

_FLAG = re.compile(r"`[^`\n]*`|(?<![\w./-])--(no-)?([a-z][a-z0-9-]*)(?:[ =]([0-9A-Z./~][^\s,;:)]*))?")
"""A flag in a message, with a value or a placeholder for one behind it; commands between backticks stay."""
_CALLED = {"from": "start_from", "output": "out", "sweep": "over", "set": "values"}


@contextmanager
def _speaking_of_keywords() -> Iterator[None]:
    """Raise errors from inside with keywords in place of flags: ``k=32`` for ``--k 32``."""
    try:
        yield
    except ActionableError as error:
        error.args = tuple(_FLAG.sub(_keyword, text) if isinstance(text, str) else text for text in error.args)
        raise


def _keyword(found: re.Match[str]) -> str:
    if found[2] is None:
        return found[0]
    name = _CALLED.get(found[2], found[2].replace("-", "_"))
    if found[1]:
        return f"{name}=False" + (f" {found[3]}" if found[3] else "")
    return f"{name}={found[3]}" if found[3] else name


@_speaking_of_keywords()
def cache(
    *,
    out: PathLike,
    config: PathLike | None = None,
    workers: int = 0,
    scheduler: str | None = None,
    compile: bool = False,
    device: str = "auto",
    threads: int | None = None,
    quiet: bool = True,
    **settings: Any,
) -> CacheResult:
    """Run a language model over text and publish its MLP inputs and outputs as a cache at ``out``.

    ``settings`` are those of `pipeline cache`, of which ``model``, ``dataset``, ``layers`` and ``tokens`` are needed.
    An unfinished cache is continued, a finished one returned as it is. Raises SettingsError, TextError, ModelError,
    ArtifactError, NonFiniteActivation, ActivationOverflow or StorageFull.

    ``tailrace.cache(model="gpt2", dataset="text.jsonl", layers="3", tokens="1M", out="caches/gpt2")``
    """
    from tailrace.pipeline.cache import stage
    from tailrace.pipeline.cache.settings import CacheSettings

    return stage.run(
        _read(CacheSettings, config, settings),
        output=as_path(out),
        compile_model=compile,
        compute=Compute(device, threads, workers, scheduler, quiet),
    )


@_speaking_of_keywords()
def train(
    cache: PathLike | None = None,
    *,
    out: PathLike,
    generation: int | None = None,
    live: bool = False,
    config: PathLike | None = None,
    start_from: PathLike | None = None,
    fresh: bool = False,
    checkpoint_steps: int | None = None,
    tensorboard: bool = False,
    wandb: str | None = None,
    reference_names: bool = False,
    shard_features: bool = False,
    device: str = "auto",
    threads: int | None = None,
    quiet: bool = True,
    **settings: Any,
) -> TrainResult:
    """Train a transcoder on a cache, or with ``live`` straight from ``model`` on ``dataset``, and publish it.

    ``settings`` are those of `pipeline train`, an architecture's beside its name: ``architecture="topk", k=32``;
    ``start_from`` is ``--from``. ``cross_layer=True`` trains one transcoder over several layers. Started by torchrun,
    several processes train it together, with ``shard_features`` each a slice of the features. An unfinished run with
    the same settings is continued, a finished one returned as it is. Raises SettingsError with every problem of the
    settings, ArtifactError, NonFiniteActivation or StorageFull.

    ``tailrace.train("caches/gpt2", out="transcoders/gpt2", k=32, d_sae=4096, steps=500)``
    """
    from tailrace.pipeline.train.from_flags import train_one

    return train_one(
        _train_settings(settings),
        config=_path(config),
        cache=_cache(cache, generation),
        live=live,
        output=as_path(out),
        start_from=_path(start_from),
        fresh=fresh,
        checkpoint_steps=checkpoint_steps,
        loggers=_loggers(tensorboard, wandb, reference_names),
        shard_features=shard_features,
        compute=Compute(device, threads, quiet=quiet),
    )


@_speaking_of_keywords()
def sweep(
    cache: PathLike | None = None,
    *,
    over: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]],
    out: PathLike,
    generation: int | None = None,
    live: bool = False,
    config: PathLike | None = None,
    start_from: PathLike | None = None,
    fresh: bool = False,
    checkpoint_steps: int | None = None,
    tensorboard: bool = False,
    wandb: str | None = None,
    reference_names: bool = False,
    device: str = "auto",
    threads: int | None = None,
    workers: int = 0,
    quiet: bool = True,
    **settings: Any,
) -> SweepResult:
    """Train transcoders of many settings side by side, from one reading of the rows, and publish the sweep at ``out``.

    ``over`` has lists of values by setting, all combinations of which are run, or a list of runs, each with what it
    changes. ``workers`` processes share the runs, on a GPU each in turn. All else is as for ``train``. Raises
    NonFiniteActivation if every run diverges.

    ``tailrace.sweep("caches/gpt2", over={"k": [16, 32], "lr": [1e-3, 2e-3]}, out="sweeps/gpt2", steps=500)``
    """
    from tailrace.pipeline.train.from_flags import train_sweep
    from tailrace.pipeline.train.grid import grid_of

    return train_sweep(
        [_train_settings(point) for point in grid_of(over)],
        _train_settings(settings),
        config=_path(config),
        cache=_cache(cache, generation),
        live=live,
        output=as_path(out),
        start_from=_path(start_from),
        fresh=fresh,
        checkpoint_steps=checkpoint_steps,
        loggers=_loggers(tensorboard, wandb, reference_names),
        compute=Compute(device, threads, workers, quiet=quiet),
    )


@overload
def analyze(
    transcoder: PathLike, *, out: PathLike, cache: PathLike | None = None, live: bool = False, **keywords: Any
) -> AnalyzeResult: ...
@overload
def analyze(
    transcoder: Sequence[PathLike], *, out: PathLike, cache: PathLike | None = None, live: bool = False, **keywords: Any
) -> list[AnalyzeResult]: ...
@_speaking_of_keywords()
def analyze(
    transcoder: Paths,
    *,
    out: PathLike,
    cache: PathLike | None = None,
    generation: int | None = None,
    live: bool = False,
    config: PathLike | None = None,
    model: PathLike | None = None,
    downstream: Paths = (),
    workers: int = 0,
    device: str = "auto",
    threads: int | None = None,
    quiet: bool = True,
    **settings: Any,
) -> AnalyzeResult | list[AnalyzeResult]:
    """Turn a transcoder into tables of features, examples and activations over ``cache``, published at ``out``.

    Of a list of transcoders, which may be folders of them or cross-layer ones, each gets tables in a folder
    of its name inside ``out``, and a list of results is returned. ``settings`` are those of `pipeline analyze`;
    ``live=True`` reads ``rows`` rows of the text ``dataset`` instead of a cache. Raises SettingsError, ArtifactError,
    ModelError or NonFiniteActivation.

    ``tailrace.analyze("transcoders/gpt2", cache="caches/gpt2", out="tables/gpt2")``
    """
    from tailrace.pipeline.analyze import many, stage
    from tailrace.pipeline.analyze.settings import AnalyzeSettings, read_flat
    from tailrace.pipeline.live.settings import FreshText

    given = _as_typed((AnalyzeSettings, FreshText), settings)
    analysis, text = read_flat(given, _path(config), is_live=live)
    arguments: dict[str, Any] = {
        "cache": _cache(cache, generation),
        "live": text,
        "output": as_path(out),
        "compute": Compute(device, threads, workers, quiet=quiet),
        "model": _text(model),
        "downstream": as_paths(downstream),
    }
    if not isinstance(transcoder, str | os.PathLike):
        return many.run(analysis, transcoders=as_paths(transcoder), **arguments)
    if many.stands_for_many(as_path(transcoder)):
        raise SettingsError(f"{transcoder}: gets tables of each transcoder, or layer, in it; give it in a list")
    return stage.run(analysis, transcoder=as_path(transcoder), **arguments)


@_speaking_of_keywords()
def evaluate(
    transcoders: Paths,
    *,
    cache: PathLike,
    generation: int | None = None,
    out: PathLike,
    config: PathLike | None = None,
    model: PathLike | None = None,
    device: str = "auto",
    threads: int | None = None,
    quiet: bool = True,
    **settings: Any,
) -> EvaluateResult:
    """Run the language model with transcoders in place of its MLPs, on contexts of ``cache``; publish it at ``out``.

    ``settings`` are those of `pipeline evaluate`; a folder stands for the transcoders in it. Cross entropies are in
    nats per token. Raises SettingsError, ArtifactError or ModelError.

    ``tailrace.evaluate("transcoders/gpt2", cache="caches/gpt2", out="evaluations/gpt2").scores``
    """
    from tailrace.pipeline.evaluate import stage
    from tailrace.pipeline.evaluate.settings import EvaluateSettings

    return stage.run(
        _read(EvaluateSettings, config, settings),
        transcoders=as_paths(transcoders),
        cache=_cache(cache, generation),
        output=as_path(out),
        compute=Compute(device, threads, quiet=quiet),
        model=_text(model),
    )


@_speaking_of_keywords()
def circuit(
    prompt: str,
    *,
    transcoders: Paths,
    out: PathLike,
    feature: tuple[int, int] | str | None = None,
    direction: Literal["encoder", "decoder"] = "encoder",
    logit: str | None = None,
    logit_difference: tuple[str, str] | None = None,
    token: int = -1,
    tables: Paths = (),
    dashboard: PathLike | None = None,
    config: PathLike | None = None,
    model: PathLike | None = None,
    device: str = "auto",
    threads: int | None = None,
    quiet: bool = True,
    **settings: Any,
) -> CircuitResult:
    """Explain a feature's activation, or a predicted token, on ``prompt`` by features, heads and tokens before it.

    One of ``feature`` (layer and index), ``logit`` and ``logit_difference`` says what is explained, at position
    ``token``, the BOS being 0. ``settings`` are those of `pipeline circuit`. Raises SettingsError, ArtifactError or
    ModelError.

    ``tailrace.circuit("The capital of France is", logit=" Paris", transcoders="transcoders", out="circuits/paris")``
    """
    from tailrace.pipeline.circuit import stage
    from tailrace.pipeline.circuit.question import Question, parse_feature
    from tailrace.pipeline.circuit.settings import CircuitSettings

    asked = parse_feature(feature) if isinstance(feature, str) else feature
    return stage.run(
        _read(CircuitSettings, config, settings),
        Question(prompt, token, asked, direction, logit, logit_difference),
        transcoders=as_paths(transcoders),
        output=as_path(out),
        tables=as_paths(tables),
        dashboard=_path(dashboard),
        model=_text(model),
        compute=Compute(device, threads, quiet=quiet),
    )


@_speaking_of_keywords()
def steer(
    prompts: str | Sequence[str] = (),
    *,
    transcoders: Paths,
    from_circuit: PathLike | None = None,
    tables: Paths = (),
    out: PathLike | None = None,
    config: PathLike | None = None,
    model: PathLike | None = None,
    device: str = "auto",
    threads: int | None = None,
    quiet: bool = True,
    **settings: Any,
) -> SteerResult:
    """Write on after ``prompts`` with features changed, beside what the language model writes by itself.

    ``settings`` are those of `pipeline steer`, of which ``feature`` says what is changed; without prompts that of
    ``from_circuit`` is run. ``out`` gets a file: .html, .parquet or .json. The result has the texts, ``summary(run)``
    and ``table()``, and nothing is published. Raises SettingsError, TextError, ArtifactError or ModelError.

    ``tailrace.steer("The people", transcoders="transcoders/gpt2", feature="3:1850=+10,+30").of(0, 1).text``
    """
    from tailrace.pipeline.steer import stage
    from tailrace.pipeline.steer.page import write_result
    from tailrace.pipeline.steer.settings import SteerSettings, check_output

    output = _path(out)
    if output is not None:
        check_output(output)
    result = stage.run(
        _read(SteerSettings, config, settings),
        [prompts] if isinstance(prompts, str) else list(prompts),
        transcoders=as_paths(transcoders),
        from_circuit=_path(from_circuit),
        tables=as_paths(tables),
        model=_text(model),
        compute=Compute(device, threads, quiet=quiet),
    )
    if output is not None:
        write_result(output, result)
    return result


@_speaking_of_keywords()
def query(
    sql: str,
    tables: Paths | Mapping[str, PathLike],
    values: Mapping[str, Any] | None = None,
    *,
    attach: Mapping[str, PathLike] | None = None,
) -> pa.Table:
    """Return the answer to one SELECT over tables, a sweep's runs or an evaluation's tokens, as an Arrow table.

    Tables by name are ``name.features`` in the SQL, which is DuckDB's; ``values`` has those of ``$name`` in it.
    ``attach`` names files of your own (.jsonl, .csv, .parquet), which are tables by these names.
    ``.to_pandas()`` makes a data frame. Raises SettingsError, ArtifactError, and ActionableError with DuckDB's message.

    ``tailrace.query("SELECT feature, top_token FROM features WHERE frequency > $rare", "tables/gpt2", {"rare": 0.01})``
    """
    from tailrace.pipeline.query.stage import select

    own = {name: as_path(path) for name, path in (attach or {}).items()}
    if isinstance(tables, Mapping):
        return select(sql, {name: as_path(path) for name, path in tables.items()}, values, own)
    return select(sql, as_paths(tables), values, own)


@_speaking_of_keywords()
def compare(
    a: PathLike,
    b: PathLike,
    *,
    transcoders: Paths = (),
    out: PathLike | None = None,
    device: str = "auto",
    threads: int | None = None,
    quiet: bool = True,
) -> ComparisonResult:
    """Match the features of tables ``a`` and ``b``: for each the most similar of the other, and how many match at all.

    By the rows on which they fire, where both keep activations of the same rows of a cache, and by decoder rows, where
    the ``transcoders`` are given. ``table`` of the result has a row for each feature, ``summary`` the shares above
    chance. Raises SettingsError if neither can be compared, ArtifactError.

    ``tailrace.compare("tables/k16", "tables/k32", transcoders="transcoders").summary["cosine"]["a"]["matched"]``
    """
    from tailrace.pipeline.compare.stage import run

    return run(
        (as_path(a), as_path(b)),
        transcoders=as_paths(transcoders),
        output=_path(out),
        compute=Compute(device, threads, quiet=quiet),
    )


@_speaking_of_keywords()
def curves(runs: Paths, out: PathLike | None = None) -> list[RunCurves]:
    """Return what runs have logged, finished or not, and a line on how each went; draw them into ``out`` if given.

    ``runs`` are transcoders, sweeps or folders of them; the file that ``out`` names ends in .html, .png or .svg. Raises
    ArtifactMissing where no run lies, and SettingsError for another ending.

    ``tailrace.curves("transcoders/gpt2")[0].heldout["fvu"]``
    """
    from tailrace.training.loop.curves import read_all

    read = read_all(as_paths(runs))
    if out is not None:
        from tailrace.pipeline.curves.picture import write_picture

        write_picture(as_path(out), read)
    return read


@_speaking_of_keywords()
def verify(
    path: PathLike,
    *,
    checksums: bool = True,
    pairs: int = 8,
    sample: float = 1.0,
    seed: int = 0,
    shuffle: bool = False,
    batch_rows: int | None = None,
    epoch: int = 0,
    generation: int | None = None,
    model: PathLike | None = None,
    device: str = "auto",
    threads: int | None = None,
    quiet: bool = True,
) -> Verification:
    """Check an artifact's bytes; of a cache, ``pairs`` contexts against the model too, and with ``shuffle`` the order.

    Of a folder, the bytes of every artifact in it. The share ``sample`` of all files is read, drawn by ``seed``; of the
    others the sizes are compared.

    What is wrong is in the result, whose ``passed`` is then False. Raises ArtifactError for what is no artifact, and
    ModelError if the model cannot be loaded.

    ``assert tailrace.verify("caches/gpt2", shuffle=True).passed``
    """
    from tailrace.pipeline.cache.verify import run

    return run(
        as_path(path),
        checksums=checksums,
        pairs=pairs,
        sample=sample,
        seed=seed,
        shuffle=shuffle,
        batch_rows=batch_rows,
        epoch=epoch,
        generation=generation,
        model=_text(model),
        compute=Compute(device, threads, quiet=quiet),
    )


@_speaking_of_keywords()
def info(path: PathLike, *, generation: int | None = None) -> dict[str, Any]:
    """Return what an artifact says of itself, finished or not, by name: what `pipeline info --json` prints.

    Raises ArtifactMissing if nothing lies there.

    ``tailrace.info("transcoders/gpt2")["metrics"]["heldout"]["fvu"]``
    """
    from tailrace.pipeline.artifacts.info_stage import describe

    return describe(as_path(path), generation)


def _read(settings: type[Read], config: PathLike | None, given: Mapping[str, Any]) -> Read:
    return read_settings(settings, _path(config), _as_typed((settings,), given))


def _train_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    from tailrace.pipeline.live.settings import LiveSettings
    from tailrace.pipeline.train.settings import ModelScoreSettings
    from tailrace.training.loop.settings import TrainSettings

    return _as_typed((TrainSettings, ModelScoreSettings, LiveSettings), given)


def _loggers(tensorboard: bool, wandb: str | None, reference_names: bool) -> Callable[[], list[Logger]]:
    from tailrace.training.loop.loggers import build_loggers

    return partial(build_loggers, tensorboard=tensorboard, wandb_project=wandb, reference_names=reference_names)


def _as_typed(classes: Sequence[type[Settings]], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as they are typed for flags: numbers and paths as text, nested settings beside their kind.

    Several values are a flag given again where a setting has several, and else separated by commas (``layers=[0, 3]``).
    """
    given = current_names(classes, given)
    fields = {name: field for settings in classes for name, field in setting_fields(settings).items()}
    for settings in classes:
        given = flat_values(settings, given)
    typed: dict[str, Any] = {}
    for name, value in given.items():
        is_several = name in fields and get_origin(fields[name].annotation) is tuple
        words = tuple(map(_word, value)) if isinstance(value, list | tuple | range) else _word(value)
        typed[name] = ",".join(map(str, words)) if isinstance(words, tuple) and not is_several else words
    return typed


def _word(value: Any) -> Any:
    """Return a number or path as text, and anything else as it is, for the settings to judge."""
    if isinstance(value, bool):
        return value
    return str(value) if isinstance(value, Number | os.PathLike) else value


def _path(path: PathLike | None) -> Path | None:
    return None if path is None else as_path(path)


@overload
def _cache(path: PathLike, generation: int | None) -> CachePath: ...
@overload
def _cache(path: PathLike | None, generation: int | None) -> CachePath | None: ...
def _cache(path: PathLike | None, generation: int | None) -> CachePath | None:
    if generation is None:
        return _path(path)
    if path is None:
        raise SettingsError("--generation: names a generation of a cache; give the cache, or leave it out")
    from tailrace.storage.generations import CacheAt

    return CacheAt(as_path(path), generation)


def _text(path: PathLike | None) -> str | None:
    return None if path is None else os.path.expanduser(path)
