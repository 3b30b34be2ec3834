"""`pipeline promotes`: what features write to the logits of tokens, by weights: any token, where tables keep ten."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from tailrace.analysis.dashboards.feature_tables import FeatureTables
from tailrace.analysis.weights.stream import write_point
from tailrace.analysis.weights.unembedding import effects_on
from tailrace.pipeline.artifacts.transcoders import layers_by_site, open_tables, open_transcoders
from tailrace.pipeline.circuit.question import token_ids
from tailrace.pipeline.model.of_transcoders import open_transcoder_model
from tailrace.pipeline.model.weights import read_weights
from tailrace.pipeline.shared.compute import Compute
from tailrace.storage.errors import SettingsError
from tailrace.storage.tables import column

SCHEMA = pa.schema(
    [
        column("token", pa.string(), "text of the token"),
        column("site", pa.string(), "site that the feature's transcoder replaces"),
        column("feature", pa.int32(), "index of the feature"),
        column("logit", pa.float32(), "what it writes to the token's logit, as `promoted_logits` of `features` has it"),
        column("token_rank", pa.int64(), "rank of the token among all that the feature writes to, 1 for the highest"),
    ]
)
ABOUT = column("about", pa.string(), "its label, or its top token; null where no tables say", nullable=True)
"""Beside the others where tables are given."""


def run(
    tokens: Sequence[str],
    *,
    transcoders: Sequence[Path],
    tables: Sequence[Path] = (),
    model: str | None = None,
    compute: Compute,
) -> pa.Table:
    """Return a row for every token and feature, the features that raise a token most first.

    A folder stands for the transcoders in it; each layer of a cross-layer one writes the sum of what it writes to all.
    ``tables`` say what features are about, ``model`` says where the language model lies. Raises SettingsError for a
    text that is not a token, and for a site whose output is not added to the residual stream; ArtifactError,
    ModelError.
    """
    given = open_transcoders(transcoders)
    layers = layers_by_site(given)
    sites = list(layers)
    known = open_tables(tables, dict(enumerate(layers.values())))
    about = {sites[place]: FeatureTables(path).descriptions() for place, path in known.items()}
    schema = SCHEMA.append(ABOUT) if tables else SCHEMA
    with compute.opened() as device, torch.inference_mode():
        opened = open_transcoder_model([one.path for one in given], model=model, device=compute.device_name)
        ids = token_ids(opened, tokens, "token")
        weights = read_weights(opened)
        points = {site: write_point(layer.site.hook_out, weights) for site, layer in layers.items()}
        if elsewhere := [layers[site].site.hook_out for site, point in points.items() if point is None]:
            raise SettingsError(
                f"{', '.join(elsewhere)}: is not added to the residual stream, so no feature there has an effect on a "
                "logit by weights alone; leave its transcoder out"
            )
        parts: list[list[pa.Table]] = [[] for _ in tokens]
        for site, point in points.items():
            assert point is not None, "refused above"
            effects, ranks = effects_on(ids, layers[site].load().W_dec.to(device).float(), point, weights)
            features = np.arange(len(effects), dtype=np.int32)
            for n, token in enumerate(tokens):
                columns = [*([name] * len(features) for name in (token, site)), features, effects[:, n], ranks[:, n]]
                if tables:
                    columns.append([about.get(site, {}).get(feature) for feature in range(len(features))])
                parts[n].append(pa.table(columns, schema=schema))
    return pa.concat_tables(pa.concat_tables(part).sort_by([("logit", "descending")]) for part in parts)


def strongest(effects: pa.Table, n: int) -> pa.Table:
    """Return the first ``n`` rows of each token."""
    tokens = pc.unique(effects["token"])
    return pa.concat_tables(effects.filter(pc.equal(effects["token"], token)).slice(0, n) for token in tokens)
