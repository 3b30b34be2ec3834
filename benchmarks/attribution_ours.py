"""Our side of attribution.py, and the maker of the transcoders and the prompt that both sides use."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tailrace.analysis.circuits.attribution import attribute, list_sources
from tailrace.analysis.circuits.attribution_graph import GraphSettings, build_graph
from tailrace.analysis.circuits.nodes import Kind
from tailrace.analysis.circuits.operators import read_heads
from tailrace.analysis.circuits.record import record_run
from tailrace.analysis.circuits.roots import Root, centred_logit_roots
from tailrace.analysis.circuits.run import LinearisedRun
from tailrace.analysis.weights.model_weights import AttentionWeights, ModelWeights
from tailrace.pipeline.model.language_model import LanguageModel, load_language_model
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.pipeline.model.weights import read_weights
from tailrace.storage.cache_format import Site
from tailrace.training.architectures import JumpReLU
from tailrace.training.architectures.base import Transcoder

TEXT = (
    "The treaty was signed in the spring, after a winter of talks that had twice been broken off and twice resumed. "
    "By its terms both governments gave up their claims to the islands, opened their harbours to each other's ships, "
    "and agreed that any later dispute should be laid before three judges, of whom neither side would name more than "
    "one. Merchants welcomed it; the newspapers of the capital, which had called for war since the autumn, did not. "
    "The minister who had carried it through was thanked by parliament and lost his seat at the next election, "
    "and it was left to his successor to explain why the harbours stood empty, the judges had not met and the islands "
    "were once more the subject of letters that grew shorter with every month"
)
REPEATS = 3


def make(model: LanguageModel, folder: Path, n_tokens: int, d_sae: int, k: int) -> dict[str, Any]:
    """Write a prompt, its likeliest next token and random transcoders in circuit-tracer's layout."""
    tokens = model.prompt_tokens([TEXT])[0][:n_tokens]
    assert len(tokens) == n_tokens, "the text is long enough"
    names = [f"blocks.{layer}.mlp.hook_in" for layer in range(model.n_layers)]
    with torch.inference_mode():
        logits, cached = model.bridge.run_with_cache(torch.tensor([tokens]), names_filter=names, use_cache=False)
    generator = torch.Generator().manual_seed(0)
    n_active = 0
    for layer, name in enumerate(names):
        inputs = cached[name][0].float()
        W_enc, W_dec = torch.randn(2, d_sae, model.d_model, generator=generator) / model.d_model**0.5
        pre = inputs @ W_enc.T
        # Between two values: one at the threshold itself would fire on one side and not on the other.
        threshold = float(pre[1:].flatten().topk(k * (n_tokens - 1) + 1).values[-2:].mean())
        n_active += int((pre[1:] > threshold).sum())
        weights = {
            "W_enc": W_enc,
            "b_enc": torch.zeros(d_sae),
            "W_dec": W_dec,
            "b_dec": torch.zeros(model.d_model),
            "activation_function.threshold": torch.full((d_sae,), threshold),
        }
        save_file({key: value.contiguous() for key, value in weights.items()}, folder / f"layer_{layer}.safetensors")
    prompt = {"tokens": tokens, "next": int(logits[0, -1].argmax()), "n_layers": model.n_layers}
    (folder / "prompt.json").write_text(json.dumps(prompt))
    return {"n_layers": model.n_layers, "n_active": n_active}


def load_transcoders(folder: Path, n_layers: int, d_model: int) -> dict[Site, Transcoder]:
    """Return the transcoders that ``make`` wrote, by site."""
    found: dict[Site, Transcoder] = {}
    for layer in range(n_layers):
        weights = load_file(folder / f"layer_{layer}.safetensors")
        transcoder = JumpReLU().build(d_model, d_model, len(weights["W_enc"]))
        own = {name: weights[name] for name in ("W_enc", "b_enc", "W_dec")}
        thresholds = weights["activation_function.threshold"]
        transcoder.load_state_dict({**own, "b_dec_out": weights["b_dec"], "log_threshold": thresholds.log()})
        hooks = (f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.mlp.hook_out")
        site = Site(f"layer{layer}", *hooks, d_model, d_model, "float32")
        found[site] = transcoder.eval().requires_grad_(False)
    return found


class Task:
    """The model, transcoders and prompt, opened once and timed several times."""

    def __init__(self, model: LanguageModel, folder: Path) -> None:
        self.model, self.prompt = model, json.loads((folder / "prompt.json").read_text())
        self.transcoders = load_transcoders(folder, model.n_layers, model.d_model)
        self.weights: ModelWeights = read_weights(model)

    def record(self) -> tuple[LinearisedRun, list[Root]]:
        """Run the model."""
        tokens = torch.tensor(self.prompt["tokens"])
        run = record_run(self.model.bridge, self.weights, self.transcoders, tokens)
        return run, centred_logit_roots(run, [self.prompt["next"]])

    def root(self) -> dict[str, list[float]]:
        """Return what tokens, and errors behind the BOS, contribute to the root."""
        run, roots = self.record()
        sources = list_sources(run)
        (row,) = attribute(run, [roots[0].probe], sources)
        errors = torch.stack([row[sources.errors[layer]] for layer in range(run.n_layers)])
        return {"tokens": row[sources.embedding].tolist(), "errors": errors[:, 1:].flatten().tolist()}

    def graph(self, n_features: int) -> int:
        """Build a graph; return how many features it has."""
        run, roots = self.record()
        graph = build_graph(run, roots, [1.0], GraphSettings(max_features=n_features))
        return int(graph.are(Kind.FEATURE).sum())


def factored(attention: AttentionWeights, pattern: Tensor, values: Tensor, n: Tensor) -> Tensor:
    """Return (heads, targets, sources) pattern · (values · W_O n)."""
    directions = read_heads(attention, n).unflatten(0, (attention.n_kv_heads, -1))
    return pattern * torch.einsum("sge,gqe->gqs", values, directions).flatten(0, 1)[:, None]


def materialised(attention: AttentionWeights, pattern: Tensor, values: Tensor, n: Tensor) -> Tensor:
    """Return the same by way of what every head writes from every source to every target, (…, d_model)."""
    shared = attention.n_heads // attention.n_kv_heads
    written = torch.einsum("she,hed->hsd", values.repeat_interleave(shared, dim=1), attention.W_O)
    return (pattern[..., None] * written[:, None]) @ n


def heads(run: LinearisedRun, form: Callable[[AttentionWeights, Tensor, Tensor, Tensor], Tensor]) -> list[Tensor]:
    """Return every layer's head contributions along one direction."""
    n = torch.randn(run.stream.shape[1], generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return [form(layer.weights.attention, layer.pattern, layer.values, n) for layer in run.layers]


def timed(work: Callable[[], Any]) -> float:
    """Return the least seconds of some runs after a first."""
    work()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def main(arguments: dict[str, Any]) -> dict[str, Any]:
    """Run one task."""
    torch.set_num_threads(1)
    folder, task = Path(arguments["folder"]), arguments["task"]
    model = load_language_model(ModelSettings(model=arguments["model"], model_dtype="float32"))
    if task == "make":
        return make(model, folder, arguments["n_tokens"], arguments["d_sae"], arguments["k"])
    one = Task(model, folder)
    if "write" in arguments:
        Path(arguments["write"]).write_text(json.dumps(one.root()))
        run, _ = one.record()
        for mine, other in zip(heads(run, factored), heads(run, materialised), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
        return {}
    if task.startswith("heads"):
        run, _ = one.record()
        form = materialised if task == "heads_materialised" else factored
        seconds = timed(lambda: heads(run, form))
    else:
        seconds = timed(one.root if task == "root" else lambda: one.graph(arguments["n_features"]))
    return {"seconds": seconds, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
