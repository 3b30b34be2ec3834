"""What can be done with every family: measured, held against transformers, and written into docs/families.md.

``python -m tests.support.family_table`` writes the table anew; a slow test compares every row with what is measured.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tailrace.analysis.circuits.attribution_graph import top_logits
from tailrace.analysis.circuits.contributions import contributions
from tailrace.analysis.circuits.record import record_run
from tailrace.analysis.circuits.roots import logit_root
from tailrace.analysis.splice.replacement import EVERY_POSITION, Substitute, run_replaced
from tailrace.pipeline.cli import cli
from tailrace.pipeline.model.language_model import LanguageModel, load_language_model
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.pipeline.model.sites import SiteHooks
from tailrace.pipeline.model.weights import read_weights
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.cache_format import Site
from tailrace.storage.errors import ActionableError
from tests.support.families import TOKENS, Family, families, reference, save_family
from tests.support.tiny_models import WORDS

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
MARK = "<!-- Do not edit below: made by python -m tests.support.family_table, checked by make test-all. -->"
CONTEXT = 16
TOLERANCE = 2e-5
"""Of the largest number: float32 in two orders of summing, through two blocks."""
ROWS, WEIGHTS = "cache", "weights"
COMMANDS = {
    **dict.fromkeys(("cache", "evaluate", "task", "export"), ROWS),
    **dict.fromkeys(("analyze", "circuit", "fold-norm"), WEIGHTS),
}
"""What each command needs of a family: rows that can be cached, or weights that can be read too."""


@dataclass
class Outcome:
    """What can be done with a family: whether rows can be cached and weights read, and why not."""

    family: Family
    works: dict[str, bool] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)
    asked: str = ""
    """Flags that are needed where not all layers can be cached as they are."""

    def row(self) -> str:
        """Return the line of the page."""
        cells = ["yes" if self.works.get(name) else "—" for name in (ROWS, WEIGHTS)]
        if self.asked:
            cells[0] = f"with `{self.asked}`"
        note = f", {self.family.note}" if self.family.note else ""
        return f"| `{self.family.architecture}`{note} | {' | '.join(cells)} | {' '.join(self.refusals)} |"


def measure(family: Family, folder: Path) -> Outcome:
    """Return what can be done with a small model of ``family``, made in ``folder``.

    Every refusal is an error with a sentence; anything else that is raised goes through. Numbers of what works are
    compared with transformers' own.
    """
    outcome = Outcome(family)
    path = save_family(folder / "model", family)
    try:
        model = load_language_model(ModelSettings(model=str(path)))
    except ActionableError as error:
        _refused(outcome, ROWS, error, folder)
        return outcome
    if not (sites := _sites(outcome, model, folder)):
        return outcome
    plain = reference(path, family)
    _compare_rows(model, plain, sites)
    _compare_identity(model, plain, sites)
    outcome.works[ROWS] = True
    try:
        _compare_circuit(model, plain)
    except ActionableError as error:
        _refused(outcome, WEIGHTS, error, folder)
    else:
        outcome.works[WEIGHTS] = True
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
                _refused(outcome, ROWS, error, folder)
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
    outcome.refusals.append(" ".join(lines).replace("|", "\\|") + ".")


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


def _compare_circuit(model: LanguageModel, plain: Any) -> None:
    """Compare the likely tokens' probabilities, which follow from the logits explained; sums are complete."""
    tokens = _contexts()[0]
    run = record_run(model.bridge, read_weights(model), {}, tokens, allow_opaque=True)
    probabilities = _logits(plain, tokens[None])[0, -1].softmax(-1)
    for token, probability in top_logits(run, -1, mass=1.0, at_most=5):
        assert abs(probability - float(probabilities[token])) < 1e-4, token
        root = logit_root(run, token)
        assert contributions(run, root.probe).incompleteness(root.value) < 1e-5, token


# The commands


def run_commands(outcome: Outcome, folder: Path) -> dict[str, bool]:
    """Return for each command whether it works with a family whose model ``measure`` made; it may refuse otherwise."""
    text, model = folder / "text.jsonl", str(folder / "model")
    generator = np.random.Generator(np.random.PCG64(0))
    text.write_text("".join(json.dumps({"text": " ".join(generator.choice(WORDS, 60))}) + "\n" for _ in range(12)))
    prompts = folder / "prompts.jsonl"
    asked = [{"prompt": prompt, "correct": ["the"], "incorrect": ["to"]} for prompt in ("it was their", "all of which")]
    prompts.write_text("".join(json.dumps(one) + "\n" for one in asked))
    cache, coders = folder / "cache", folder / "coders"
    chosen = outcome.asked.split() or ["--layers", "all"]
    works = {
        "cache": _works(
            "cache", "--model", model, *chosen, "--dataset", text, "--tokens", "all", "--holdout", "0.2",
            "--context-length", CONTEXT, "--storage-dtype", "float32", "--out", cache, "--quiet",
        )
    }  # fmt: skip
    if not works["cache"]:
        return dict.fromkeys(COMMANDS, False)
    assert _works("verify", cache, "--model", model)
    sites = list(open_cache(cache).sites)
    for site in sites:
        assert _works(
            "train", cache, "--site", site, "--architecture", "topk", "--k", "2", "--d-sae", "16", "--steps", "3",
            "--batch-rows", "64", "--out", coders / site, "--quiet",
        )  # fmt: skip
    last = coders / sites[-1]
    commands: dict[str, tuple[Any, ...]] = {
        "evaluate": ("evaluate", coders, "--cache", cache, "--model", model),
        "analyze": ("analyze", last, "--cache", cache, "--model", model),
        "circuit": (
            "circuit", "the people which", "--logit", "the", "--transcoders", coders, "--missing-layers", "opaque",
            "--model", model,
        ),
        "task": ("task", prompts, "--transcoders", last, "--model", model, "--kept", "0", "--leave-out", "0"),
        "export": ("export", last, "--to", "saelens", "--cache", cache, "--rows", "64"),
        "fold-norm": (
            "export", last, "--to", "saelens", "--cache", cache, "--rows", "64", "--fold-norm", "--model", model
        ),
    }  # fmt: skip
    return works | {
        name: _works(*arguments, "--out", folder / f"{name} out", "--quiet") for name, arguments in commands.items()
    }


def _works(*arguments: Any) -> bool:
    """Return whether a command does its work; False if it says why it does not."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            cli.main(args=[str(argument) for argument in arguments], prog_name="pipeline", standalone_mode=False)
    except ActionableError:
        return False
    finally:
        logging.disable(before)
    return True


# The page


def table(rows: Sequence[str]) -> str:
    """Return what stands below ``MARK`` on the page."""
    lines = [
        MARK,
        "",
        f"Made with TransformerLens {version('transformer_lens')} and transformers {version('transformers')}.",
        "",
        "| architecture | rows | weights | why not |",
        "|---|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def measured_row(family: Family) -> str:
    """Return the row of a family, measured in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        return measure(family, Path(folder)).row()


def main() -> None:
    """Measure every family and write the table."""
    rows = [measured_row(family) for family in families()]
    above = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    PAGE.write_text(above + table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
