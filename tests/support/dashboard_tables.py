"""Small published tables with everything a dashboard can show, or with parts left out, made without any model.

Texts of tokens are as unkind as tokenizers can make them. Statistics follow from activations drawn here, so that what a
page says can be compared with them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tailrace.analysis.harvest.histogram import EDGES, find_bins
from tailrace.storage.cache_format import Site
from tailrace.storage.draft import Draft

WORDS = (
    *(" March", " April", " May", " the", " of", "ing", " King", "\n", " ", "  ", "\t"),
    *("</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", '"quoted"', "&amp;", "'", "\\u0041"),
    *("�", "\u202eevil", "\u200b", "é", "名", "<|endoftext|>", "89"),
)
N_CONTEXTS, CONTEXT = 40, 32
DEAD, DENSE = 3, 5
N_BANDS = 5
PARTS = frozenset({"model", "kinds", "activations", "coactivation", "connections", "extras"})
"""What tables may lack: promoted tokens; banded and random examples; …; and the columns of later versions. ``rows``
is not among them, and has to be asked for too."""


@dataclass(frozen=True)
class MadeTables:
    """Published tables, and the activations they were made from."""

    path: Path
    activations: NDArray[np.float32]
    """(rows, features)."""


def make_tables(
    path: Path,
    d_sae: int = 70,
    parts: Collection[str] = PARTS,
    seed: int = 0,
    *,
    n_documents: int = 10,
    model: str = "tiny<b>lm",
    kept: Sequence[str] = (),
) -> MadeTables:
    """Publish tables of ``d_sae`` features at ``path``, with those of ``PARTS`` that are asked for.

    ``kept``: values of a column of the dataset, of documents in turn.
    """
    documents = np.arange(N_CONTEXTS) * n_documents // N_CONTEXTS
    rng = np.random.default_rng(seed)
    n_rows = N_CONTEXTS * CONTEXT
    tokens = rng.integers(0, len(WORDS), n_rows)
    activations = np.where(rng.random((n_rows, d_sae)) < 0.04, rng.exponential(2.0, (n_rows, d_sae)) + 0.05, 0)
    activations[:, DEAD] = 0
    activations[:, DENSE] += (rng.random(n_rows) < 0.5) * 0.5
    activations = activations.astype(np.float32)
    tables: dict[str, pa.Table] = {
        "features": _features(activations, parts, rng),
        "examples": _examples(activations, tokens, documents, parts, rng),
        "layers": _layers(activations),
    }
    if "activations" in parts:
        tables |= _activation_files(activations)
    if "rows" in parts:
        tables["rows"] = _rows(tokens, documents)
    if kept:
        source = [kept[document % len(kept)] for document in range(n_documents)]
        tables["documents"] = pa.table({"document": range(n_documents), "source": source})
    if "coactivation" in parts:
        tables["coactivation"] = _coactivation(d_sae)
    if "connections" in parts:
        tables["connections"] = _connections(d_sae, rng)
    request = {"settings": {"split": "heldout"}, "seed": seed, "parts": sorted(parts), "d_sae": d_sae}
    with Draft(path, "tables", request) as draft:
        (path / "activations").mkdir()
        for name, table in tables.items():
            pq.write_table(table, path / f"{name}.parquet", row_group_size=64)
        draft.publish(
            {
                "inputs": {
                    "cache": {"cache_id": "c0", "generation": 0, "digest": "d"},
                    "transcoder": {"digest": "sha256:00"},
                },
                "model": {"name": model},
                "site": asdict(Site("layer1", "blocks.1.mlp.hook_in", "blocks.1.mlp.hook_out", 16, 16, "float32")),
                "tables": {name: {"n_rows": table.num_rows} for name, table in tables.items()},
            },
            [f"{name}.parquet" for name in tables],
        )
    return MadeTables(path, activations)


def _features(activations: NDArray[np.float32], parts: Collection[str], rng: np.random.Generator) -> pa.Table:
    columns: dict[str, list[Any]] = {}
    d_sae = activations.shape[1]
    for feature in range(d_sae):
        for name, value in _statistics(activations[:, feature]).items():
            columns.setdefault(name, []).append(value)
    columns = {"feature": list(range(d_sae)), **columns}
    if "extras" in parts:
        columns |= {
            "frequency_low": [0.9 * frequency for frequency in columns["frequency"]],
            "frequency_high": [1.1 * frequency for frequency in columns["frequency"]],
            "n_token_ids": [7 if "activations" in parts else None] * d_sae,
            "token_id_share": [7 / len(WORDS) if "activations" in parts else None] * d_sae,
            "position_frequency": rng.random((d_sae, 16)).tolist(),
            "nearest_features": [[(feature + step) % d_sae for step in range(1, 11)] for feature in range(d_sae)],
            "nearest_cosines": [[1 - 0.05 * step for step in range(1, 11)]] * d_sae,
        }
    if "model" in parts:
        columns |= {
            "promoted_tokens": [_some_words(feature) for feature in range(d_sae)],
            "promoted_logits": [[2.0 - 0.1 * rank for rank in range(10)]] * d_sae,
            "suppressed_tokens": [_some_words(feature + 5) for feature in range(d_sae)],
            "suppressed_logits": [[-1.0 + 0.05 * rank for rank in range(10)]] * d_sae,
            "logit_histogram": rng.integers(0, 100, (d_sae, 50)).tolist(),
            "logit_histogram_edges": [np.linspace(-1, 2, 51).tolist()] * d_sae,
        }
    facts = {"position_edges": " ".join(f"{edge:g}" for edge in np.arange(17) * CONTEXT / 16)}
    return _with_types(columns, {"feature": pa.int32(), "max": pa.float32()}).replace_schema_metadata(facts)


def _some_words(start: int) -> list[str]:
    return [WORDS[(start + rank) % len(WORDS)] for rank in range(10)]


def _statistics(values: NDArray[np.float32]) -> dict[str, Any]:
    active = values[values > 0]
    counts = np.bincount(find_bins(active), minlength=len(EDGES) - 1) if len(active) else np.zeros(1, np.int64)
    used = np.flatnonzero(counts)
    bins = slice(used[0], used[-1] + 1) if len(used) else slice(0, 0)
    is_live = len(active) > 0
    return {
        "frequency": len(active) / len(values),
        "n_active": len(active),
        "mean": float(active.mean()) if is_live else None,
        "std": float(active.std()) if is_live else None,
        "max": float(active.max()) if is_live else None,
        **{f"p{percent}": float(np.percentile(active, percent)) if is_live else None for percent in (10, 50, 90, 99)},
        "histogram": counts[bins].tolist(),
        "histogram_edges": EDGES[bins.start : bins.stop + 1].tolist() if is_live else [],
        "decoder_norm": 1.0,
        "encoder_norm": 1.5,
        "encoder_bias": -0.25,
        "is_dead": not is_live,
        "is_dense": len(active) / len(values) > 0.1,
    }


def _examples(
    activations: NDArray[np.float32],
    tokens: NDArray[np.int64],
    documents: NDArray[np.int64],
    parts: Collection[str],
    rng: np.random.Generator,
) -> pa.Table:
    rows = []
    for feature in range(activations.shape[1]):
        values = activations[:, feature]
        order = np.argsort(-values, kind="stable")[: (values > 0).sum()]
        chosen: list[tuple[str, int | None, int]] = [("top", None, row) for row in order[:8]]
        if "kinds" in parts and len(order):
            edges = values.max().astype(float) * np.arange(N_BANDS + 1) / N_BANDS
            for band in range(N_BANDS):
                inside = [row for row in order if edges[band] < values[row] <= edges[band + 1]]
                chosen += [("band", band, row) for row in inside[:3]]
            chosen += [("random", None, row) for row in rng.permutation(order)[:4]]
        own = [_example(feature, kind, band, int(row), values, tokens) for kind, band, row in chosen]
        rows += [{**example, "document": int(documents[example["context"]])} for example in own]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    if "kinds" not in parts:
        del columns["kind"], columns["band"]
    return _with_types(columns, {"feature": pa.int32(), "band": pa.int32(), "activation": pa.float32()})


def _example(
    feature: int, kind: str, band: int | None, row: int, values: NDArray[np.float32], tokens: NDArray[np.int64]
) -> dict[str, Any]:
    context, position = divmod(row, CONTEXT)
    start, stop = max(0, position - 8), min(CONTEXT, position + 5)
    window = range(context * CONTEXT + start, context * CONTEXT + stop)
    return {
        "feature": feature,
        "kind": kind,
        "band": band,
        "rank": 0,
        "activation": float(values[row]),
        "row": row,
        "context": context,
        "position": position,
        "document": None,
        "token": WORDS[tokens[row]],
        "window_start": start,
        "window_tokens": [WORDS[tokens[place]] for place in window],
        "window_activations": [
            None if place % CONTEXT == 0 and place != row else float(values[place]) for place in window
        ],
    }


def _layers(activations: NDArray[np.float32]) -> pa.Table:
    fires = activations > 0
    layer = {
        "site": "layer1",
        "split": "heldout",
        "n_rows": len(activations),
        "d_sae": activations.shape[1],
        "l0_mean": float(fires.sum(axis=1).mean()),
        "fvu": 0.25,
        "n_dead": int((~fires.any(axis=0)).sum()),
        "n_dense": int((fires.mean(axis=0) > 0.1).sum()),
    }
    return pa.Table.from_pylist([layer])


def _activation_files(activations: NDArray[np.float32]) -> dict[str, pa.Table]:
    files = {}
    for start in range(0, activations.shape[1], 32):
        stop = min(start + 32, activations.shape[1])
        feature, row = np.nonzero(activations.T[start:stop])
        files[f"activations/features-{start:06}-{stop - 1:06}"] = pa.table(
            {
                "feature": pa.array(feature + start, pa.int32()),
                "row": row,
                "activation": activations[row, feature + start],
            }
        )
    return files


def _rows(tokens: NDArray[np.int64], documents: NDArray[np.int64]) -> pa.Table:
    context, position = np.divmod(np.arange(len(tokens)), CONTEXT)
    columns = {"row": np.arange(len(tokens)), "token_id": tokens, "token": [WORDS[token] for token in tokens]}
    return pa.table({**columns, "context": context, "position": position, "document": documents[context]})


def _coactivation(d_sae: int) -> pa.Table:
    rows = [
        {
            "feature": feature,
            "other": (feature + 2 + rank) % d_sae,
            "n_both": 9 - rank,
            "jaccard": 0.5,
            "phi": 0.6,
            "rank": rank,
        }
        for feature in range(0, d_sae, 2)
        for rank in range(4)
    ]
    return _with_types({name: [row[name] for row in rows] for name in rows[0]}, {"feature": pa.int32()})


def _connections(d_sae: int, rng: np.random.Generator) -> pa.Table:
    rows = []
    empty = {name: None for name in ("layer", "head", "site", "other", "token_id", "token")}
    for feature in range(d_sae):
        for rank in (*range(10), *range(-1, -11, -1)):
            weight = 1.0 - 0.05 * rank if rank >= 0 else -1.0 - 0.05 * rank
            word = (feature + rank) % len(WORDS)
            own = {"rank": rank, "token_id": word, "token": WORDS[word], "weight": weight, "feature": feature}
            rows.append(empty | {"kind": "token"} | own)
        norms = np.sort(rng.random(8))[::-1]
        places = [(layer, head) for layer in range(2) for head in range(4)]
        for rank, (norm, place) in enumerate(zip(norms, rng.permutation(places), strict=True)):
            own = {"layer": int(place[0]), "head": int(place[1]), "feature": feature}
            rows.append(empty | own | {"kind": "head", "rank": rank, "weight": float(norm)})
            for token in range(10 if rank < 2 else 0):
                through = {"kind": "head_token", "rank": token, "token": WORDS[token], "weight": 1.0 - 0.1 * token}
                rows.append(empty | own | through)
        for rank in (0, 1, -1):
            later = {
                "kind": "feature",
                "rank": rank,
                "layer": 2,
                "site": "layer2",
                "other": 40 + rank,
                "feature": feature,
            }
            rows.append(empty | later | {"weight": 0.5 if rank >= 0 else -0.5})
    kinds = ("token", "head", "head_token", "feature")
    rows.sort(key=lambda row: (row["feature"], kinds.index(row["kind"])))
    types = {"feature": pa.int32(), "site": pa.string(), "token_id": pa.int32(), "weight": pa.float32()}
    return _with_types({name: [row[name] for row in rows] for name in rows[0]}, types)


def _with_types(columns: dict[str, list[Any]], types: dict[str, pa.DataType]) -> pa.Table:
    return pa.table({name: pa.array(values, types.get(name)) for name, values in columns.items()})
