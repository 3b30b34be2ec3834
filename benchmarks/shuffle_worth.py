"""Question: what is a shuffle of all rows on disk worth, beside the buffers that other tools mix rows in?

One transcoder is trained for one epoch on the same rows in different orders and scored on the same held-out speeches.
The text is 236 years of speeches in the order of their years, so its document order drifts more than a web crawl's; the
orders that begin by shuffling speeches leave out that drift.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import Report, parse_arguments, scratch_folder
from tailrace.pipeline.cache import stage as cache_stage
from tailrace.pipeline.cache.settings import CacheSettings
from tailrace.pipeline.samples.bundled_models import bundled_model
from tailrace.pipeline.samples.speeches import fetch_sotu
from tailrace.pipeline.shared.compute import Compute
from tailrace.storage.activation_cache import ActivationCache, CacheSplit, open_cache
from tailrace.storage.cache_format import Site
from tailrace.storage.shuffle import philox, random_permutation
from tailrace.storage.shuffle_evidence import Groups, pair_moments, same_document_pairs
from tailrace.training.kernels.adaptive import resolve_precision
from tailrace.training.loop.build import build_run
from tailrace.training.loop.evaluate import HeldoutScore, evaluate
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.loop.train_all import ScheduledRun, train
from tailrace.training.rows.batches import Batch, SiteBatches, as_tensor, iter_once, keys_of

SEEDS = (0, 1, 2)
STUDENT_T = 4.303
"""The 97.5 % point of Student's t with two degrees of freedom: three seeds."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Size:
    tokens: int | str
    buffers: tuple[int, ...]
    d_sae: int
    k: int
    batch_rows: int


FULL = Size("all", (2**14, 2**17, 2**20), d_sae=2048, k=32, batch_rows=4096)
QUICK = Size(40_000, (2**11, 2**13), d_sae=256, k=16, batch_rows=512)


@dataclass(frozen=True, eq=False)
class Rows:
    """The training rows of a cache in memory, in document order, in the type they are stored in."""

    split: CacheSplit
    site: Site
    sides: tuple[np.ndarray, ...]
    document: np.ndarray
    """(rows,): the document of each row."""
    token: np.ndarray
    """int64 (rows,): where each row's token stands in the text, ascending."""

    @classmethod
    def read(cls, cache: ActivationCache) -> Rows:
        (site,) = cache.sites.values()
        split = cache.split("train")
        keys = [*keys_of(site), "document", "context", "position"]
        units = [split.read_unit(unit, keys) for unit in range(split.n_units)]
        arrays = {key: np.concatenate([unit[key] for unit in units]) for key in keys}
        token = token_index(arrays, cache.layout.context_length)
        assert (np.diff(token) > 0).all(), "units hold the text in order"
        return cls(split, site, tuple(arrays[key] for key in keys_of(site)), arrays["document"], token)

    @property
    def n_rows(self) -> int:
        return len(self.document)


def token_index(arrays: Mapping[str, np.ndarray], context_length: int) -> np.ndarray:
    """Return int64 (rows,): how many tokens of contexts come before each row's."""
    return arrays["context"].astype(np.int64) * context_length + arrays["position"]


class OrderedBatches:
    """A ``BatchStream`` of rows in memory in a given order, for one epoch; a short last batch is left out."""

    def __init__(self, rows: Rows, order: np.ndarray, batch_rows: int) -> None:
        self._rows = rows
        self.n_steps = len(order) // batch_rows
        self._batches = iter(order[: self.n_steps * batch_rows].reshape(self.n_steps, batch_rows))

    def next_batch(self) -> SiteBatches:
        rows, site = self._rows, self._rows.site
        chosen = next(self._batches)
        dtype = rows.split.dtype(keys_of(site)[0])
        inputs, outputs = (as_tensor(side[chosen], dtype).to(torch.float32) for side in rows.sides)
        return {site.name: Batch(inputs, outputs)}

    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError("runs of this benchmark are not resumed")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        raise NotImplementedError("runs of this benchmark are not resumed")


def mixed(order: np.ndarray, buffer_rows: int, seed: int) -> np.ndarray:
    """Return ``order`` as a mixing buffer serves it.

    The buffer is filled to ``buffer_rows`` and permuted; half of it is served, the other half stays and the buffer is
    filled up again. Once the text has ended, what stays is served.
    """
    generator = np.random.Generator(philox(seed, "shuffle-worth/buffer", buffer_rows))
    kept, served, taken = order[:0], [], 0
    while taken < len(order):
        fresh = order[taken : taken + buffer_rows - len(kept)]
        taken += len(fresh)
        buffer = generator.permutation(np.concatenate([kept, fresh]))
        served.append(buffer[: buffer_rows // 2])
        kept = buffer[buffer_rows // 2 :]
    return np.concatenate([*served, kept])


def shuffled_documents(rows: Rows, seed: int) -> np.ndarray:
    """Return rows in text order, but documents in random order."""
    documents, which = np.unique(rows.document, return_inverse=True)
    rank = random_permutation(philox(seed, "shuffle-worth/documents"), len(documents))
    return np.argsort(rank[which], kind="stable")


def cache_order(rows: Rows, seed: int, batch_rows: int) -> np.ndarray:
    """Return the rows in the order in which the cache serves them to a training run with this ``order_seed``."""
    context_length = rows.split.layout.context_length
    with rows.split.stream(["context", "position"], batch_rows=batch_rows, seed=seed, n_epochs=1) as stream:
        tokens = [token_index(batch.arrays, context_length) for batch in stream]
    return np.searchsorted(rows.token, np.concatenate(tokens))


def orders(rows: Rows, size: Size) -> dict[str, Callable[[int], np.ndarray]]:
    """Return every order by name: a function of the seed that gives a permutation of the rows."""
    text, middle = np.arange(rows.n_rows), size.buffers[len(size.buffers) // 2]

    def buffer_of(buffer_rows: int) -> Callable[[int], np.ndarray]:
        return lambda seed: mixed(text, buffer_rows, seed)

    return {
        "uniform": lambda seed: random_permutation(philox(seed, "shuffle-worth/uniform"), rows.n_rows),
        "cache": lambda seed: cache_order(rows, seed, size.batch_rows),
        **{f"buffer of {n:,}": buffer_of(n) for n in reversed(size.buffers)},
        "document order": lambda _: text,
        f"speeches shuffled, buffer of {middle:,}": lambda seed: mixed(shuffled_documents(rows, seed), middle, seed),
        "speeches shuffled": lambda seed: shuffled_documents(rows, seed),
    }


def pairs_over_uniform(rows: Rows, order: np.ndarray, batch_rows: int) -> float:
    """Return how many pairs of rows of a batch are of one document, over what chance would give."""
    documents = rows.document[order[: len(order) // batch_rows * batch_rows]]
    sizes = np.unique(documents, return_counts=True)[1]
    batches = np.full(len(documents) // batch_rows, batch_rows)
    return same_document_pairs(documents, batch_rows) / float(
        pair_moments(Groups.of(batches), Groups.of(sizes), len(documents))[0]
    )


def settings_of(size: Size, kind: str, seed: int) -> TrainSettings:
    architecture = {"kind": kind, "k": size.k}
    return TrainSettings.model_validate({"architecture": architecture, "d_sae": size.d_sae, "seed": seed})


def train_once(rows: Rows, order: np.ndarray, size: Size, kind: str, seed: int, heldout: list[Batch]) -> HeldoutScore:
    """Return the score of a transcoder after one epoch in ``order``."""
    stream = OrderedBatches(rows, order, size.batch_rows)
    run = build_run(
        settings_of(size, kind, seed),
        rows.site,
        {side: rows.split.statistics(rows.site.name, side) for side in rows.site.sides},
        n_steps=stream.n_steps,
        device=CPU,
        precision=resolve_precision("auto", CPU),
    )
    train(stream, [ScheduledRun(run, stream.n_steps)])
    return evaluate(run.predict, heldout)


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Return the geometric mean of paired ratios and its 95 % interval by Student's t over seeds."""
    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.mean(logs)
    half = STUDENT_T * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.2f} %"


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    size = QUICK if arguments.quick else FULL
    torch.set_num_threads(1)
    with scratch_folder(arguments) as folder:
        speeches = fetch_sotu(arguments.scratch / "speeches.jsonl")  # kept: the next run needs no network
        cache = write_cache(speeches, folder / "cache", size)
        rows = Rows.read(cache)
        heldout = [
            Batch(batch.inputs.clone(), batch.outputs.clone())
            for batch in iter_once(cache.split("heldout"), rows.site, batch_rows=4096)
        ]
        report = new_report(rows, size, sum(len(batch.inputs) for batch in heldout))
        for kind in ("topk", "batch_topk"):
            add(report, rows, size, kind, heldout)
    report.finish(arguments)


def write_cache(speeches: Path, output: Path, size: Size) -> ActivationCache:
    """Cache layer 2 of the bundled model over the speeches, in the order of their years."""
    settings = CacheSettings(
        model=str(bundled_model("tiny-lm")),
        model_dtype="float32",
        dataset=str(speeches),
        shuffle_window=0,
        tokens=size.tokens,
        layers="2",
        holdout="7::20",  # the speeches the model never saw
    )
    return open_cache(cache_stage.run(settings, output=output, compute=Compute(threads=1, quiet=True)).path)


def new_report(rows: Rows, size: Size, n_heldout: int) -> Report:
    n_steps = rows.n_rows // size.batch_rows
    return Report(
        "shuffle_worth",
        "What a true shuffle is worth",
        f"Layer 2 of the bundled model (width {rows.site.d_in}) on presidents' speeches: {rows.n_rows:,} training rows "
        f"of {len(np.unique(rows.document))} speeches, one epoch of {n_steps} steps of {size.batch_rows:,} rows, "
        f"{size.d_sae:,} features, k = {size.k}, all other settings at their defaults, seeds "
        f"{', '.join(map(str, SEEDS))} (weights and order). Scored on all {n_heldout:,} held-out rows (every twentieth "
        "speech), sums in float64. Document order: the speeches by year, rows as they stand in the text. Buffer of n: "
        "filled to n rows in document order and permuted; half is served, the other half stays, filled up again, "
        "permuted, and so on. Speeches shuffled: the same after the speeches were put in random order. Cache: as "
        "`pipeline train` reads it. Uniform: a permutation of all rows, drawn anew for every seed. The cache's order "
        "is uniform too, so its line is the noise of the comparison. Pairs: of rows of one speech in one batch, over "
        f"chance (seed {SEEDS[0]}). Over uniform: geometric mean over seeds of FVU over that of the uniform order with "
        "the same seed, with a 95 % interval by Student's t. Dead: features that fire on no held-out row.",
        (
            *("architecture", "order", "pairs", *(f"FVU, seed {seed}" for seed in SEEDS)),
            *("over uniform", "95 %", "L0", "dead"),
        ),
        ("numpy", "torch"),
    )


def add(report: Report, rows: Rows, size: Size, kind: str, heldout: list[Batch]) -> None:
    """Train in every order and add a row for each."""
    reference: list[float] = []
    for name, order_of in orders(rows, size).items():
        start = time.perf_counter()
        scores, pairs = [], 0.0
        for seed in SEEDS:
            order = order_of(seed)
            check_permutation(order, rows.n_rows)
            pairs = pairs or pairs_over_uniform(rows, order, size.batch_rows)
            scores.append(train_once(rows, order, size, kind, seed, heldout))
        fvu = [score.fvu for score in scores if score.fvu is not None]
        reference = reference or fvu
        ratio, low, high = interval([mine / other for mine, other in zip(fvu, reference, strict=True)])
        cells = (f"{pairs:.3g}", *(f"{value:.5f}" for value in fvu))
        if fvu is not reference:
            cells += (percent(ratio), f"{percent(low)} to {percent(high)}")
            report.ratios[f"{kind}_{name.replace(' ', '_').replace(',', '')}_fvu_over_uniform"] = ratio
        else:
            cells += ("", "")
        l0, dead = (statistics.mean(getattr(score, what) for score in scores) for what in ("l0", "dead_fraction"))
        report.rows.append((kind, name, *cells, f"{l0:.1f}", f"{100 * dead:.1f} %"))
        print(*report.rows[-1], f"{time.perf_counter() - start:.0f} s", sep=" | ", flush=True)


def check_permutation(order: np.ndarray, n_rows: int) -> None:
    """Every order must serve every row once, or it would be compared on other rows."""
    assert np.array_equal(np.sort(order), np.arange(n_rows)), "an order serves every row exactly once"


if __name__ == "__main__":
    main()
