"""The contenders of cache_stage.py, each in a process of its own."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tailrace.pipeline.cache import stage as cache
from tailrace.pipeline.cache.settings import CacheSettings
from tailrace.pipeline.model.language_model import LanguageModel, load_language_model
from tailrace.pipeline.shared.compute import Compute
from tailrace.storage.activation_cache import ActivationCache, open_cache


def stage(settings: CacheSettings, path: Path, threads: int) -> tuple[int, float]:
    """Return tokens and seconds of the whole stage with a model that is loaded and warm."""
    model = load_language_model(settings)
    with Compute(threads=threads).opened():
        tokens = torch.full((settings.contexts_per_batch, settings.context_length), model.bos_token_id)
        model.capture(tokens, model.resolve_sites(settings.layers))
    setattr(cache, "load_language_model", lambda *_, **__: model)  # noqa: B010
    start = time.perf_counter()
    result = cache.run(settings, output=path, compute=Compute(threads=threads, quiet=True))
    return n_tokens(result.cache), time.perf_counter() - start


def n_tokens(made: ActivationCache) -> int:
    """Return the tokens the model has to read for a cache: those of every context, held-out ones included."""
    return sum(made.split(name).n_contexts for name in made.manifest.splits) * made.layout.context_length


def capture(model: LanguageModel, settings: CacheSettings) -> Callable[[torch.Tensor], object]:
    """Return the stage's way to the activations."""
    sites = model.resolve_sites(settings.layers)
    return lambda tokens: model.capture(tokens, sites)


def run_with_cache(model: LanguageModel, settings: CacheSettings) -> Callable[[torch.Tensor], object]:
    """Return TransformerBridge's way to the same activations."""
    (site,) = model.resolve_sites(settings.layers)
    names, stop = [site.hook_in, site.hook_out], int(settings.layers or 0) + 1

    def run(tokens: torch.Tensor) -> object:
        with torch.inference_mode():
            return model.bridge.run_with_cache(tokens, names_filter=names, stop_at_layer=stop, return_type=None)

    return run


def model_alone(kind: str, settings: CacheSettings, path: Path, threads: int) -> tuple[int, float]:
    """Return tokens and seconds of the model over full batches of a cache's contexts, again and again."""
    train, size = open_cache(path).split("train"), settings.contexts_per_batch
    found = torch.from_numpy(train.context_tokens(np.arange(train.n_contexts)).astype(np.int64))
    batches = [batch for batch in found.split(size) if len(batch) == size]
    n_batches = int(settings.tokens) // ((settings.context_length - 1) * size)
    model = load_language_model(settings)
    run = {"capture": capture, "run_with_cache": run_with_cache}[kind](model, settings)
    with Compute(threads=threads).opened():
        run(batches[0])
        start = time.perf_counter()
        for batch in itertools.islice(itertools.cycle(batches), n_batches):
            run(batch)
        return n_batches * batches[0].numel(), time.perf_counter() - start


def main(arguments: dict[str, Any]) -> None:
    settings = CacheSettings(
        model=arguments["model"],
        model_dtype=arguments["dtype"],
        dataset=arguments["text"],
        tokens=arguments["n_rows"],
        layers=str(arguments["layer"]),
        contexts_per_batch=arguments["contexts_per_batch"],
    )
    path, threads = Path(arguments["path"]), arguments["threads"]
    if arguments["task"] == "stage":
        tokens, seconds = stage(settings, path, threads)
    else:
        tokens, seconds = model_alone(arguments["task"], settings, path, threads)
    print(json.dumps({"tokens": tokens, "seconds": seconds}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
