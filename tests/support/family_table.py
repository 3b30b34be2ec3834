"""What every command does with every family: measured, held against transformers, and written into docs/families.md.

``python -m tests.support.family_table`` writes the table anew; a slow test compares every row with what is measured.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tailrace.analysis.splice.replacement import EVERY_POSITION, Substitute, run_replaced
from tailrace.pipeline.cli import cli
from tailrace.pipeline.model.language_model import LanguageModel, load_language_model
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.pipeline.model.sites import SiteHooks
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.cache_format import Site
from tailrace.storage.errors import ActionableError
from tailrace.storage.tables import read_table
from tests.support.families import TOKENS, Family, families, reference, save_family
from tests.support.tiny_models import WORDS

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
MARK = "<!-- Do not edit below: made by python -m tests.support.family_table, checked by make test-all. -->"
CONTEXT = 16
TOLERANCE = 2e-5
"""Of the largest number: float32 in two orders of summing, through two blocks."""
COMMANDS = ("cache", "evaluate", "analyze", "circuit", "task", "export", "fold-norm")


@dataclass
class Outcome:
    """What commands do with a family: whether each works, and why those do not that refuse it."""

    family: Family
    works: dict[str, bool] = field(default_factory=dict)
    refusals: dict[str, list[str]] = field(default_factory=dict)
    """Sentence → the commands that refuse with it."""
    asked: str = ""
    """Flags that are needed where not all layers can be cached as they are."""

    def row(self) -> str:
        """Return the line of the page."""
        cells = ["yes" if self.works.get(name) else "—" for name in COMMANDS]
        if self.asked:
            cells[0] = f"with `{self.asked}`"
        reasons = " ".join(f"*{', '.join(names)}*: {reason}." for reason, names in self.refusals.items())
        note = f", {self.family.note}" if self.family.note else ""
        return f"| `{self.family.architecture}`{note} | {' | '.join(cells)} | {reasons} |"


def measure(family: Family, folder: Path) -> Outcome:
    """Return what commands do with a small model of ``family``, made in ``folder``.

    Every refusal is an error with a sentence; anything else that is raised goes through. Numbers of what works are
    compared with transformers' own.
    """
    outcome = Outcome(family)
    path = save_family(folder / "model", family)
    try:
        model = load_language_model(ModelSettings(model=str(path)))
    except ActionableError as error:
        _refused(outcome, "cache", error, folder)
        return outcome
    sites = _sites(outcome, model, folder)
    if not sites:
        return outcome
    plain = reference(path, family)
    _compare_rows(model, plain, sites)
    _compare_identity(model, plain, sites)
    _run_commands(outcome, folder, plain, sites)
    return outcome


def _sites(outcome: Outcome, model: LanguageModel, folder: Path) -> list[SiteHooks]:
    """Return the sites that can be cached: all layers, with the hooks advised, or the last layer."""
    last = model.n_layers - 1
    own = ["--hooks", f"layer{last}=blocks.{last}.mlp.hook_in:blocks.{last}.hook_mlp_out"]
    for flags in (["--layers", "all"], own, ["--layers", str(last)]):
        try:
            given = dict([flags])
            sites = model.resolve_sites(given.get("--layers"), [flags[1]] if flags[0] == "--hooks" else [])
        except ActionableError as error:
            if flags[1] == "all":
                _refused(outcome, "cache", error, folder)
            continue
        outcome.asked = "" if flags[1] == "all" else " ".join(flags)
        return sites
    return []


def _refused(outcome: Outcome, name: str, error: ActionableError, folder: Path) -> None:
    outcome.works[name] = False
    lines = str(error).replace(f"model {folder / 'model'}: ", "").replace("model model: ", "").splitlines()
    lines = [line.strip() for line in lines if not line.startswith(("1 problem in the sites", "The tables need"))]
    if len(lines) > 1:  # of many blocks the first is enough
        lines = [lines[0], re.sub(r" \(they differ by .*?\)", "", lines[1])]
    outcome.refusals.setdefault(" ".join(lines).replace("|", "\\|"), []).append(name)


# Against transformers


def _compare_rows(model: LanguageModel, plain: Any, sites: Sequence[SiteHooks]) -> None:
    """Compare what is captured with what goes in and out of transformers' own modules."""
    tokens = _contexts()
    captured = {hook: value.clone() for hook, value in model.capture(tokens, sites).items()}
    for site in sites:
        layer = int(site.hook_in.split(".")[1])
        seen = _of_module(plain, model, layer, tokens, is_own=site.default_layer is None)
        for hook, value in zip((site.hook_in, site.hook_out), seen, strict=True):
            assert _error(captured[hook].flatten(), value.flatten()) < TOLERANCE, hook


def _of_module(plain: Any, model: LanguageModel, layer: int, tokens: Tensor, *, is_own: bool) -> tuple[Tensor, Tensor]:
    """Return what goes into the MLP of a layer and comes out, by hooks of torch alone.

    TransformerLens says what transformers calls its modules; the matrices of some MLPs lie in the block itself. With
    ``is_own``, what comes out is that of the MLP's last matrix.
    """
    mlp = model.bridge.blocks[layer].mlp
    block = plain.get_submodule(f"{model.bridge.adapter.component_mapping['blocks'].name}.{layer}")
    whole = block if mlp.name is None else block.get_submodule(mlp.name)
    first = whole.get_submodule(getattr(mlp, "in").name) if mlp.name is None else whole
    last = whole.get_submodule(mlp.out.name) if mlp.name is None or is_own else whole
    seen: dict[str, Tensor] = {}

    def note_input(_module: Any, given: Any, named: Mapping[str, Any]) -> None:
        seen["in"] = (given[0] if given else next(iter(named.values()))).clone()

    def note_output(_module: Any, _given: Any, made: Any) -> None:
        seen["out"] = (made[0] if isinstance(made, tuple) else made).clone()

    handles = [
        first.register_forward_pre_hook(note_input, with_kwargs=True), last.register_forward_hook(note_output)
    ]  # fmt: skip
    try:
        _logits(plain, tokens)
    finally:
        for handle in handles:
            handle.remove()
    return seen["in"], seen["out"]


class _Copied(Substitute):
    """The model's own output, in memory of its own."""

    def __call__(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        return outputs.clone()


def _compare_identity(model: LanguageModel, plain: Any, sites: Sequence[SiteHooks]) -> None:
    """Compare the cross entropy with every site replaced by itself with transformers'."""
    tokens, widths = _contexts(), model.widths(sites)
    copies = {Site(*site, *widths[site.name], "float32"): _Copied() for site in sites}
    with torch.inference_mode():
        spliced = run_replaced(model.bridge, tokens, copies, EVERY_POSITION)
    ours, theirs = _cross_entropy(spliced.double(), tokens), _cross_entropy(_logits(plain, tokens), tokens)
    assert abs(ours - theirs) < TOLERANCE * max(1.0, theirs), (ours, theirs)


def _contexts() -> Tensor:
    tokens = torch.randint(4, len(TOKENS), (2, CONTEXT), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = TOKENS.index("<bos>")
    return tokens


def _logits(plain: Any, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = plain(input_ids=tokens, use_cache=False).logits.double()
    return logits


def _cross_entropy(logits: Tensor, tokens: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))


def _error(made: Tensor, wanted: Tensor) -> float:
    return float((made.double() - wanted.double()).abs().max() / wanted.double().abs().max())


# The commands


def _run_commands(outcome: Outcome, folder: Path, plain: Any, sites: Sequence[SiteHooks]) -> None:
    text, model = folder / "text.jsonl", str(folder / "model")
    generator = np.random.Generator(np.random.PCG64(0))
    text.write_text("".join(json.dumps({"text": " ".join(generator.choice(WORDS, 60))}) + "\n" for _ in range(12)))
    cache, coders = folder / "cache", folder / "coders"
    chosen = outcome.asked.split() or ["--layers", "all"]
    _ran(
        outcome, folder, "cache", "--model", model, *chosen, "--dataset", text, "--tokens", "all", "--holdout", "0.2",
        "--context-length", CONTEXT, "--storage-dtype", "float32", "--out", cache, "--quiet",
    )  # fmt: skip
    assert outcome.works["cache"], outcome.refusals
    _call("verify", cache, "--model", model, "--quiet")
    for site in sites:
        _call(
            "train", cache, "--site", site.name, "--architecture", "topk", "--k", "2", "--d-sae", "16", "--steps", "3",
            "--batch-rows", "64", "--out", coders / site.name, "--quiet",
        )  # fmt: skip
    prompts = folder / "prompts.jsonl"
    asked = [{"prompt": prompt, "correct": ["the"], "incorrect": ["to"]} for prompt in ("it was their", "all of which")]
    prompts.write_text("".join(json.dumps(one) + "\n" for one in asked))
    last = coders / sites[-1].name
    if _ran(
        outcome,
        folder,
        "evaluate",
        coders,
        "--cache",
        cache,
        "--model",
        model,
        "--out",
        folder / "evaluated",
        "--quiet",
    ):
        _compare_evaluation(folder / "evaluated", cache, plain)
    _ran(outcome, folder, "analyze", last, "--cache", cache, "--model", model, "--out", folder / "tables", "--quiet")
    if _ran(
        outcome, folder, "circuit", "the people which", "--logit", "the", "--transcoders", coders, "--missing-layers",
        "opaque", "--model", model, "--out", folder / "circuit", "--quiet",
    ):  # fmt: skip
        _compare_circuit(folder / "circuit" / "circuit.json", plain)
    _ran(
        outcome, folder, "task", prompts, "--transcoder", last, "--model", model, "--kept", "0", "--leave-out", "0",
        "--out", folder / "task", "--quiet",
    )  # fmt: skip
    exported = ("export", last, "--to", "saelens", "--cache", cache, "--rows", "64")
    _ran(outcome, folder, *exported, "--out", folder / "exported", "--quiet")
    _ran(
        outcome, folder, *exported, "--fold-norm", "--model", model, "--out", folder / "folded", "--quiet",
        name="fold-norm",
    )  # fmt: skip


def _ran(outcome: Outcome, folder: Path, *arguments: Any, name: str = "") -> bool:
    name = name or arguments[0]
    try:
        _call(*arguments)
    except ActionableError as error:
        _refused(outcome, name, error, folder)
        return False
    outcome.works[name] = True
    return True


def _call(*arguments: Any) -> None:
    with _silent():
        result = cli.main(args=[str(argument) for argument in arguments], prog_name="pipeline", standalone_mode=False)
    assert not result, f"{arguments[0]} ended with {result}"


@contextmanager
def _silent() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    finally:
        logging.disable(before)


def _compare_evaluation(path: Path, cache: Path, plain: Any) -> None:
    rows = read_table(path / "tokens.parquet").to_pylist()
    contexts = np.unique([row["context"] for row in rows])
    tokens = torch.from_numpy(open_cache(cache).split("heldout").context_tokens(contexts).astype(np.int64))
    ours = float(np.mean([row["ce_original"] for row in rows]))
    theirs = _cross_entropy(_logits(plain, tokens), tokens)
    assert abs(ours - theirs) < TOLERANCE * max(1.0, theirs), (ours, theirs)


def _compare_circuit(path: Path, plain: Any) -> None:
    """Compare the likely tokens' probabilities, which follow from the logits, and see that sums are complete."""
    document = json.loads(path.read_text())
    tokens = torch.tensor([[token["id"] for token in document["tokens"]]])
    probabilities = _logits(plain, tokens)[0, -1].softmax(-1)
    for token in document["likely"]:
        assert abs(token["probability"] - float(probabilities[token["id"]])) < 1e-4, token
    assert document["root"]["incompleteness"] < 1e-5


# The page


def table(rows: Sequence[str]) -> str:
    """Return what stands below ``MARK`` on the page."""
    names = ["`export --fold-norm`" if name == "fold-norm" else f"`{name}`" for name in COMMANDS]
    lines = [
        MARK,
        "",
        f"Made with TransformerLens {version('transformer_lens')} and transformers {version('transformers')}.",
        "",
        f"| architecture | {' | '.join(names)} | why not |",
        "|" + "---|" * (len(COMMANDS) + 2),
        *rows,
    ]
    return "\n".join(lines) + "\n"


def measured_row(family: Family) -> str:
    """Return the row of a family, measured in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        return measure(family, Path(folder)).row()


def main() -> None:
    """Measure every family, in two processes, and write the page."""
    chosen = families()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        rows = pool.map(measured_row, chosen, chunksize=1)
    above = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    PAGE.write_text(above + table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
