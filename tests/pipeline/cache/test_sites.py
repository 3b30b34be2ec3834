"""Sites that are no MLP (residual stream, attention, heads) go through every stage like any other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tailrace.pipeline.cache import stage, verify
from tailrace.pipeline.model.language_model import load_language_model
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.pipeline.shared.compute import Compute
from tailrace.storage.activation_cache import ActivationCache, open_cache
from tailrace.storage.artifact import read_json
from tailrace.storage.cache_verify import verify_bytes
from tailrace.storage.errors import ArtifactMismatch, ModelError
from tailrace.training.architectures.transcoder import load_transcoder
from tests.support.cache_jobs import (
    HERE,
    command,
    copy_cache,
    differing,
    model_folder,
    plain_forward,
    run_cache,
    small_blocks,
    text_file,
    tree,
)
from tests.support.paths import DOCS
from tests.support.quick import quick

Z = "blocks.1.attn.hook_z"
HOOKS = {
    "pre": "blocks.1.hook_resid_pre",
    "mid": "blocks.0.hook_resid_mid",
    "post": "blocks.0.hook_resid_post",
    "attn": "blocks.1.hook_attn_out",
    "z": Z,
    "head0": f"{Z}[0]",
    "head3": f"{Z}[3]",
    "pair": f"{Z}[3]:blocks.1.hook_attn_out",
}
WIDTHS = {name: 4 if "[" in hook else 16 for name, hook in HOOKS.items()}
PLAIN = {
    "pre/in": "h.1/in",
    "mid/in": "h.0.ln_2/in",
    "post/in": "h.1/in",
    "attn/in": "h.1.attn.c_proj/out",
    "z/in": "h.1.attn.c_proj/in",
    "head0/in": "h.1.attn.c_proj/in",
    "head3/in": "h.1.attn.c_proj/in",
    "pair/in": "h.1.attn.c_proj/in",
    "pair/out": "h.1.attn.c_proj/out",
}
"""What is stored, and where in GPT-2 as transformers runs it; d_head is 4, so head 3 is columns 12 to 15 of z."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "cache"
    run_cache(path, layers=None, hooks=tuple(f"{name}={hook}" for name, hook in HOOKS.items()))
    return path


def documented_hooks() -> dict[str, str]:
    """Return the widths of the hooks that docs/guides/sites.md recommends, as it says them."""
    lines = (DOCS / "guides" / "sites.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `blocks.L.")]
    return {hook.strip("`").replace("L", "0", 1): width for hook, _, width in cells}


def test_the_hooks_of_the_documentation_exist_and_have_the_widths_it_says() -> None:
    model = load_language_model(ModelSettings(model=str(model_folder())))
    documented = documented_hooks()
    widths = model.widths(model.resolve_sites(None, list(documented)))
    meant = {"d_model": 16, "n_heads · d_head": 4 * 4, "d_head": 4, "d_mlp": 64}
    assert [width for width, _ in widths.values()] == [meant[text] for text in documented.values()]
    assert len(documented) == 7


def rows(cache: ActivationCache, keys: list[str], split: str = "train") -> dict[str, np.ndarray]:
    """Return all rows of a split in token order."""
    units = [cache.split(split).read_unit(unit, keys) for unit in range(cache.split(split).n_units)]
    return {key: np.concatenate([unit[key] for unit in units]) for key in keys}


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_stored_rows_are_those_of_plain_forward_hooks(cache: Path, split: str) -> None:
    opened = open_cache(cache)
    stored = rows(opened, [*PLAIN, "context", "position"], split)
    contexts = opened.split(split).context_tokens(np.arange(opened.split(split).n_contexts))
    computed = plain_forward(contexts, sorted(set(PLAIN.values())))
    for key, module in PLAIN.items():
        expected = computed[module][stored["context"].astype(int), stored["position"].astype(int)]
        if key.startswith(("head", "pair/in")):
            head = 0 if key == "head0/in" else 3
            expected = expected[:, 4 * head : 4 * head + 4]
        np.testing.assert_allclose(stored[key], expected, rtol=1e-4, atol=1e-5, err_msg=key)


def test_the_manifest_keeps_the_brackets_and_one_side_where_both_hooks_are_the_same(cache: Path) -> None:
    sites = open_cache(cache).sites
    assert (sites["head3"].hook_in, sites["head3"].hook_out, sites["head3"].sides) == (f"{Z}[3]", f"{Z}[3]", ("in",))
    assert (sites["pair"].hook_in, sites["pair"].hook_out) == (f"{Z}[3]", "blocks.1.hook_attn_out")
    assert (sites["pair"].d_in, sites["pair"].d_out, sites["pair"].sides) == (4, 16, ("in", "out"))
    assert {name: site.d_in for name, site in sites.items()} == WIDTHS
    assert read_json(cache / "train/sites/head3/zarr.json")["attributes"] == {
        "hook_in": f"{Z}[3]",
        "hook_out": f"{Z}[3]",
    }


def test_verifying_runs_the_slices_again_and_says_that_pairing_is_not_applicable(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = verify.check_pairs(cache, n_contexts=5, compute=Compute(threads=1))
    assert {(report.site, report.side) for report in reports} == {tuple(key.split("/")) for key in PLAIN}
    for report in reports:
        assert (report.relative_error, report.is_mlp, report.mlp_relative_error) == (0, False, None)
    answer = command(capsys, "verify", cache, "--threads", 1)
    assert answer.code == 0, answer
    lines = [line for line in answer.out.splitlines() if line.startswith("ok   pairs")]
    assert len(lines) == 2 * len(PLAIN)
    assert all(line.endswith(", pairing check not applicable") for line in lines)


def test_a_slice_of_another_head_fails_verification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # as if it had been written so, with its checksums
    monkeypatch.setattr("tailrace.storage.activation_cache.refuse_damaged", lambda *_, **__: None)
    path = tmp_path / "cache"
    run_cache(path, layers=None, hooks=(f"one={Z}[1]", f"two={Z}[2]"), holdout="0")
    for shard in sorted((path / "train/sites/one/in/c").glob("*/0")):
        shard.write_bytes((path / "train/sites/two/in/c" / shard.parent.name / "0").read_bytes())
    reports = {report.site: report for report in verify.check_pairs(path, compute=Compute(threads=1))}
    assert (reports["one"].passed, reports["two"].passed) == (False, True)


def test_info_shows_the_hook_of_a_one_sided_site_once(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = command(capsys, "info", cache)
    assert answer.code == 0, answer
    assert f"{Z}[3] (4), float32; mean output norm" in answer.out
    assert f"{Z}[3] (4) -> blocks.1.hook_attn_out (16), float32" in answer.out


@pytest.mark.parametrize("name", quick(HOOKS, "head3", "pair"))
def test_every_kind_of_site_is_trained_and_analysed(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / "transcoder"
    settings = ("--site", name, "--steps", 5, "--d-sae", 64, "--architecture", "topk", "--k", 4, "--batch-rows", 50)
    trained = command(capsys, "train", cache, "--out", out, *settings, "--threads", 1, "--quiet")
    assert trained.code == 0, trained
    transcoder = load_transcoder(out)
    assert (transcoder.d_in, transcoder.d_out) == (WIDTHS[name], 16 if name == "pair" else WIDTHS[name])
    tables = tmp_path / "tables"
    analysed = command(capsys, "analyze", out, "--cache", cache, "--out", tables, "--threads", 1, "--quiet")
    assert analysed.code == 0, analysed
    asked = command(capsys, "query", "SELECT count(*) AS n FROM features", "--tables", tables)
    assert "64" in asked.out
    hook_in, _, hook_out = HOOKS[name].partition(":")
    site = json.loads((tables / "manifest.json").read_text())["site"]
    assert (site["hook_in"], site["hook_out"]) == (hook_in, hook_out or hook_in)


def test_the_command_names_folders_without_brackets_and_measures_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cache"
    what = ("--model", model_folder(), "--dataset", text_file(), "--tokens", 64, "--context-length", 16, "--out", path)
    hooks = ("--hooks", f"{Z}[0]", "--hooks", f"{Z}[3]:blocks.1.hook_attn_out")
    names = f"{Z}.head0, {Z}.head3-to-blocks.1.hook_attn_out"
    planned = command(capsys, "cache", *what, *hooks, "--dry-run", "--threads", 1)
    assert planned.code == 0, planned
    assert f"64 rows of {names}, " in planned.out
    assert f"float32   {(4 + 4 + 16) * 4 + 14} bytes per row" in planned.out
    assert not path.exists()
    made = command(capsys, "cache", *what, *hooks, "--threads", 1)
    assert made.code == 0, made
    assert f"of {names} (" in made.out
    assert sorted(folder.name for folder in (path / "train/sites").iterdir() if folder.is_dir()) == names.split(", ")


def test_heads_the_model_does_not_have_are_refused_with_those_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_folder(family="llama")  # four query heads share two of keys and values
    what = ("--model", model, "--dataset", text_file(), "--tokens", 64, "--context-length", 16)
    hooks = [f"{Z}[4]", f"{Z}[-1]", "blocks.0.attn.hook_k[2]", "blocks.0.mlp.hook_in[0]", f"{Z}[x]"]
    asked = [part for hook in hooks for part in ("--hooks", hook)]
    for extra in ((), ("--dry-run",)):
        answer = command(capsys, "cache", *what, *asked, "--out", tmp_path / "cache", *extra)
        assert answer.code == 1
        assert answer.err.splitlines()[-6:] == [
            "error: 5 problems in the sites asked for:",
            f"  hooks '{Z}[x]': '{Z}[x]' is not understood; brackets hold the number of one head, such as "
            "blocks.0.attn.hook_z[5]",
            f"  site {Z}.head4: {Z}[4]: this hook has 4 heads, 0 to 3",
            f"  site {Z}.head-1: {Z}[-1]: this hook has 4 heads, 0 to 3",
            "  site blocks.0.attn.hook_k.head2: blocks.0.attn.hook_k[2]: this hook has 2 heads, 0 to 1",
            "  site blocks.0.mlp.hook_in.head0: blocks.0.mlp.hook_in[0]: this hook has no heads, it holds one vector "
            "per position; leave out [0]. Heads are at blocks.L.attn.hook_z, hook_q, hook_k and hook_v",
        ]
    assert tree(tmp_path / "cache") == {}


@pytest.mark.slow
def test_a_cache_widened_by_heads_and_extended_holds_the_bytes_of_one_made_at_once(tmp_path: Path) -> None:
    heads = (f"{Z}[0]", f"zero-to-attn={Z}[0]:blocks.1.hook_attn_out", "mid=blocks.0.hook_resid_mid")
    at_once, grown = tmp_path / "at once", tmp_path / "grown"
    run_cache(at_once, hooks=heads, tokens=700, holdout="0", storage_dtype="int8")
    run_cache(grown, holdout="0", storage_dtype="int8")
    with small_blocks():
        stage.widen(grown, None, heads, **HERE)
        assert stage.widen(grown, None, heads, **HERE).n_new_rows == 0
        stage.extend(grown, 700, **HERE)
    found, expected = (
        {name: data for name, data in tree(path).items() if name.startswith("train/") and "/c/" in name}
        for path in (grown, at_once)
    )
    assert differing(found, expected) == []
    assert verify_bytes(grown) == []
    assert all(report.passed for report in verify.check_pairs(grown, compute=Compute(threads=1)))
    scales = read_json(grown / "manifest.json")["format"]["column_scales"]
    assert sorted(scales) == sorted(
        ["layer0/in", "layer0/out", f"{Z}.head0/in", "zero-to-attn/in", "zero-to-attn/out", "mid/in"]
    )


def test_widening_refuses_another_head_under_a_taken_name_and_heads_there_are_not(cache: Path, tmp_path: Path) -> None:
    path = copy_cache(cache, tmp_path / "cache")
    before = tree(path)
    with pytest.raises(ArtifactMismatch, match=r"its site head0 is .*hook_z\[0\] -> .*not .*hook_z\[1\]"):
        stage.widen(path, None, [f"head0={Z}[1]"], **HERE)
    with pytest.raises(ModelError, match="this hook has 4 heads, 0 to 3"):
        stage.widen(path, None, [f"{Z}[4]"], **HERE)
    assert differing(tree(path), before) == []
