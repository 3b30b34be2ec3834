"""What the README and the pages of docs/ say can be typed, can be typed; every command is documented, every link leads
somewhere."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import yaml

import tailrace
from benchmarks.results_page import results
from docs.theme import pages
from tailrace import circuits
from tailrace.pipeline.cache import stage as cache
from tailrace.pipeline.cache.settings import CacheSettings
from tailrace.pipeline.cli import COMMANDS, cli
from tailrace.pipeline.samples.bundled_models import bundled_model
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train import stage as train
from tailrace.training.architectures import ReLU
from tailrace.training.dead_features.auxiliary import Ghost
from tailrace.training.loop.settings import TrainSettings
from tests.support.notebooks import NOTEBOOKS, code_cells
from tests.support.paths import DOCS, ROOT, SPEECHES

README = ROOT / "README.md"
GENERATED = {DOCS / pages.COMMAND_LINE, *(path.with_suffix(".md") for path in NOTEBOOKS)}
WRITTEN = [README, *sorted(DOCS.rglob("*.md"))]
TEXTS = {path: path.read_text() for path in WRITTEN} | {DOCS / pages.COMMAND_LINE: pages.command_line()}
SITE = {path: text for path, text in TEXTS.items() if path != README}
NO_SETTINGS = {"query", "verify", "info"}
COMMAND_OF = {"sweep": "train"}
"""The command whose flags are the keywords of a function, where its name is another."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(language: str, text: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def command_lines() -> Iterator[tuple[str, str]]:
    """Yield every ``pipeline …`` line of a shell block with its page, continuation lines joined."""
    for path, text in TEXTS.items():
        lines = "\n".join(blocks("bash", text)).replace("\\\n", " ").splitlines()
        for line in lines:
            if match := re.match(r"(?:pipeline|tailrace) \S.*", line.strip()):
                own = re.match(r"""(?:[^'"|]|'[^']*'|"[^"]*")*""", match[0])  # up to a pipe into another program
                yield name_of(path), re.sub(r"\$\(for .*?; done\)", "--hooks many", own[0].rstrip() if own else "")


def python_blocks() -> Iterator[tuple[str, str]]:
    """Yield every Python block of a page, and every notebook's cells as one, with the name of its file."""
    for path, text in TEXTS.items():
        yield from ((name_of(path), block) for block in blocks("python", text))
    for path in NOTEBOOKS:
        yield name_of(path), "\n".join("".join(cell["source"]) for cell in code_cells(path))


def inline(start: str) -> Iterator[tuple[str, str]]:
    """Yield code inside sentences and tables that begins with ``start``, with its page."""
    for path, text in TEXTS.items():
        outside = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
        yield from ((name_of(path), code) for code in re.findall(rf"`({start}[^`]+)`", outside))


def find_command(words: list[str]) -> tuple[click.Command, list[str]]:
    """Return the command that words call, which may lie in a group, and the words that are its arguments."""
    command: click.Command | None = cli
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name, *words = words
        command = command.get_command(click.Context(command), name)
        assert command is not None, f"no command {name!r}"
    assert command is not None
    return command, words


def flags(command: click.Command) -> set[str]:
    written = {
        name for option in command.get_params(click.Context(command)) for name in (*option.opts, *option.secondary_opts)
    }
    return written | {"--help-all", "--debug", "--log-level", "--version"}


@pytest.mark.parametrize(("page", "line"), list(command_lines()))
def test_every_command_line_is_understood(page: str, line: str) -> None:
    command, arguments = find_command(shlex.split(line, comments=True)[1:])
    if not isinstance(command, click.Group):
        command.make_context("it", arguments, resilient_parsing="--help" in line)  # raises for an unknown flag or value


@pytest.mark.parametrize(("page", "code"), list(inline("(?:pipeline|tailrace) ")))
def test_every_command_in_a_sentence_exists_with_its_flags(page: str, code: str) -> None:
    words = code.replace("|", " ").split()[1:]
    if not words or words[0] not in COMMANDS:
        assert words[0].isupper() or words[0].startswith("-"), f"no command {words[0]!r}"
        return
    command, arguments = find_command(words)
    used = {re.split(r"[=\]]", word.strip("[…"))[0] for word in arguments if word.strip("[…").startswith("--")}
    assert used - flags(command) == set()


@pytest.mark.parametrize(("page", "block"), list(python_blocks()))
def test_every_python_block_imports_what_is_there_and_passes_keywords_that_exist(page: str, block: str) -> None:
    tree = ast.parse(block)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tailrace"):
            module = import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
    check_uses(tree)


@pytest.mark.parametrize(("page", "code"), list(inline(r"tailrace\.[a-zA-Z]")))
def test_every_python_name_in_a_sentence_exists(page: str, code: str) -> None:
    try:
        tree = ast.parse(code.replace("…", "..."))
    except SyntaxError:
        tree = ast.parse(code.split("(")[0])
    check_uses(tree)


def check_uses(tree: ast.AST) -> None:
    """Check that names of ``tailrace`` are public or modules, and keywords of its functions parameters or settings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "tailrace" and node.attr not in tailrace.__all__:
                import_module(f"tailrace.{node.attr}")
            if node.value.id == "circuits":
                assert node.attr in circuits.__all__ or node.attr not in dir(circuits)
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("tailrace."):
            name = ast.unparse(node.func).removeprefix("tailrace.")
            function: Any = getattr(tailrace, name, None)
            if function is None or not callable(function):
                continue
            known = set(inspect.signature(function).parameters)
            if "settings" in known:
                known |= {flag[2:].replace("-", "_") for flag in flags(find_command([COMMAND_OF.get(name, name)])[0])}
            assert {keyword.arg for keyword in node.keywords if keyword.arg} - known == set(), f"tailrace.{name}"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small version of what `make demo` leaves behind."""
    folder = tmp_path_factory.mktemp("readme")
    place = folder / "demo" / "tiny-layer2"
    settings = CacheSettings(
        model=str(bundled_model("tiny-lm")), dataset=str(SPEECHES), layers="2", tokens=6000, holdout="1"
    )
    cache.run(settings, output=place / "cache", compute=Compute(quiet=True))
    training = TrainSettings.model_validate(
        {"architecture": {"kind": "topk", "k": 8}, "d_sae": 64, "steps": 5, "batch_rows": 512}
    )
    train.run(training, cache=place / "cache", output=place / "transcoder", compute=Compute(quiet=True))
    return folder


def test_every_python_block_of_the_start_runs_in_order(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo)
    names: dict[str, object] = {}
    for block in blocks("python", TEXTS[DOCS / "start.md"]):
        exec(block, names)
    stream_position = names["position"]
    assert (stream_position.epoch, stream_position.step) == (1, 0)  # type: ignore[attr-defined]
    assert names["mlp_out"].shape[1] == 128  # type: ignore[attr-defined]
    assert (demo / "demo" / "tiny-layer2" / "small-tables" / "features.parquet").exists()


@pytest.mark.parametrize("page", sorted((DOCS / "porting").glob("*.md")), ids=name_of)
def test_every_flag_in_the_right_column_of_a_porting_page_is_a_flag(page: Path) -> None:
    cells = re.findall(r"^\| .* \| (.*) \|$", TEXTS[page], re.MULTILINE)
    named = {
        flag for cell in cells for code in re.findall(r"`([^`]+)`", cell) for flag in re.findall(r"--[a-z0-9-]+", code)
    }
    assert named
    assert named - set().union(*(flags(find_command([name])[0]) for name in COMMANDS)) == set()


def test_the_six_files_of_the_readme_are_short_and_in_their_order() -> None:
    listed = re.findall(r"^\d\. \[([\w/.]+)\]\(([\w/.]+)\)", TEXTS[README], re.MULTILINE)
    assert len(listed) == 6
    assert all(name == link for name, link in listed)
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name, _ in listed}
    assert {name: length for name, length in lengths.items() if length > 400} == {}
    assert len(TEXTS[README].splitlines()) <= 170


def test_numbers_of_the_readme_with_a_result_beside_them_are_that_results() -> None:
    text = " ".join(TEXTS[README].split())
    claims = {
        "written at {} times": ("saelens_cache", "write_vs_saelens"),
        "read shuffled at {} times": ("saelens_cache", "gathered_read_vs_saelens"),
        "takes 1/{} of the time of SAELens'": ("train_step_24576_topk", "topk_vs_saelens_24576"),
        "and 1/{} of sparsify's": ("train_step_24576_topk", "topk_vs_sparsify_24576"),
        "side by side take {} of the time": ("sweep", "sweep_over_separate_runs"),
        "are made {} times as fast as SAEDashboard": ("analyze", "pass_and_tables_vs_saedashboard_extrapolated"),
    }
    recorded = results()
    for words, (name, ratio) in claims.items():
        assert words.format(f"{recorded[name]['ratios'][ratio]:.2g}") in text, words
        assert f"docs/results.md#{name}" in text
    worth = recorded["shuffle_worth"]["ratios"]["topk_buffer_of_131072_fvu_over_uniform"]
    assert f"131,072 rows costs {100 * worth - 100:.0f} % of held-out FVU" in text
    assert round(recorded["attribution"]["ratios"]["graph_vs_circuit_tracer"]) == 9, "a ninth"


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = {
        match for text in TEXTS.values() for match in re.findall(r"(?<![\w-])make ([a-z][a-z-]*)(?=[` \n])", code(text))
    }
    assert {"demo", "test", "docs", "check"} <= named
    assert [name for name in named if not re.search(rf"^[a-z -]*\b{name}\b[a-z -]*:", makefile, re.MULTILINE)] == []


def code(text: str) -> str:
    """Return only what is set as code, blocks and inline."""
    return "\n".join(re.findall(r"```.*?```|`[^`]+`", text, re.DOTALL))


def test_every_command_is_in_a_guide_and_on_the_page_of_the_command_line() -> None:
    guides = "".join(text for path, text in SITE.items() if path.parent.name in {"guides", "docs"})
    assert [name for name in COMMANDS if f"pipeline {name}" not in guides and f"make {name}" not in guides] == []
    reference = SITE[DOCS / pages.COMMAND_LINE]
    assert [name for name in COMMANDS if f"\n### pipeline {name} " not in reference] == []


def test_the_page_of_the_command_line_has_every_option_under_the_heading_of_its_help() -> None:
    sections = pages.command_line().split("\n### pipeline ")
    (text,) = (section for section in sections if section.startswith("train "))
    command, _ = find_command(["train"])
    headings = command.sections(click.Context(command))  # type: ignore[attr-defined]
    assert re.findall(r"^\*\*(.+)\*\*$", text, re.MULTILINE) == list(headings)
    for heading, options in headings.items():
        below = text.split(f"**{heading}**")[1].split("\n**")[0]
        assert below.count("\n| `-") == len(options)


def test_every_public_name_is_on_the_page_of_the_python_reference_once() -> None:
    named = re.findall(r"^::: tailrace\.([\w.]+)$", TEXTS[DOCS / "reference" / "python.md"], re.MULTILINE)
    assert sorted(named) == sorted([*tailrace.__all__, *(f"circuits.{name}" for name in circuits.__all__)])


@pytest.mark.parametrize("path", WRITTEN, ids=name_of)
def test_every_link_leads_somewhere(path: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", TEXTS[path]) if not link.startswith("http")]
    targets = [(path.parent / link).resolve() for link in links]
    assert [str(target) for target in targets if not target.exists() and target not in GENERATED] == []


def test_every_page_is_in_the_sites_menu() -> None:
    menu = yaml.safe_load(re.search(r"^nav:\n.*", (ROOT / "mkdocs.yml").read_text(), re.DOTALL | re.MULTILINE)[0])  # type: ignore[index]
    listed = set(re.findall(r"[\w/-]+\.md", yaml.safe_dump(menu)))
    assert {str(path.relative_to(DOCS)) for path in (*SITE, *GENERATED)} == listed


def test_the_example_files_are_the_reference_run() -> None:
    """`train_transcoder.py` of the original: every figure of it, as our settings mean it."""
    examples = ROOT / "docs" / "examples"
    cached = CacheSettings.read_file(examples / "gpt2-layer8-cache.yaml")
    assert (cached.model, cached.processing, cached.dataset) == ("gpt2", "compatibility", "Skylion007/openwebtext")
    (hooks,) = cached.hooks
    assert hooks.endswith("blocks.8.ln2.hook_normalized:blocks.8.hook_mlp_out")
    assert (cached.tokens, cached.context_length, cached.contexts_per_batch) == (60_000_000, 128, 32)
    assert cached.row_mask(cached.context_length)(np.zeros((1, 128), np.int64)).all()  # position 0, the BOS, too
    trained = TrainSettings.read_file(examples / "gpt2-layer8-train.yaml")
    relu, ghost = trained.architecture, trained.auxiliary
    assert isinstance(relu, ReLU)
    assert isinstance(ghost, Ghost)
    assert (relu.l1, relu.input_bias, relu.tied_bias, relu.skip, relu.tanh_scale) == (1.4e-4, True, False, False, None)
    assert (trained.n_features(768), trained.batch_rows) == (24_576, 4096)
    assert trained.n_steps(60_000_000, 14_648) == 14_649  # until 60 million are reached
    schedule = trained.build_schedule(14_649)
    lrs = [trained.lr * schedule.factor(step) for step in (0, 2499, 4999, 5000, 14_648)]
    assert lrs == pytest.approx([4e-4 / 5000, 2e-4, 4e-4, 4e-4, 4e-4])
    assert (trained.reconstruction, trained.normalisation, trained.optimiser) == ("reference", "none", "adam")
    assert (trained.gradient_clip, trained.ema, trained.max_norm_multiple) == (None, None, None)
    assert (trained.bias_init, trained.encoder_init, trained.encoder_scale) == ("mean", "kaiming", 1)
    assert (ghost.ghost_rescale, trained.dead_after_steps, trained.resampling.kind) == ("elementwise", 5000, "none")
    assert (trained.feature_sampling_window, trained.dead_feature_threshold, trained.snapshots) == (1000, 1e-8, 3)
    assert trained.without_effect(14_649) == []
