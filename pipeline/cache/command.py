"""``pipeline cache``, ``extend``, ``widen``, ``shuffle`` and ``verify``: the commands on a cache."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from tailrace.pipeline.artifacts.made import echo_made
from tailrace.pipeline.cache.settings import CacheSettings
from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared import units
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.shared.options import read_settings, settings_options
from tailrace.pipeline.shared.sections import SectionCommand, running
from tailrace.storage.names import by_number
from tailrace.storage.settings import parse_quantity

if TYPE_CHECKING:
    from tailrace.pipeline.cache.budget import Budget
    from tailrace.pipeline.cache.stage import CacheResult
    from tailrace.pipeline.cache.verify import PairingReport, Verification
    from tailrace.storage.activation_cache import ActivationCache
    from tailrace.storage.generations import CachePath
    from tailrace.storage.shuffle_evidence import ShuffleEvidence


_SCHEDULER = running(
    "--scheduler",
    help="Address of a Dask scheduler to use instead of --workers; it must be your own and secured (tls://...), since "
    "whoever reaches it runs code as you.",
)


@click.command("cache", cls=SectionCommand)
@options.out
@settings_options(CacheSettings)
@click.option("--dry-run", is_flag=True, help="Measure for a moment, print rows, bytes and hours, and write nothing.")
@running("--compile", "compile_model", is_flag=True, help="Compile the model's MLPs with torch.compile.")
@options.as_json
@options.computing(options.workers, _SCHEDULER, options.device, options.threads, options.quiet)
def command(
    output: Path,
    config: Path | None,
    dry_run: bool,
    compile_model: bool,
    as_json: bool,
    compute: Compute,
    **given: Any,
) -> None:
    """Cache a language model's MLP inputs and outputs on text.

    \b
    pipeline cache --model gpt2 --layers 8 --dataset Skylion007/openwebtext \\
        --tokens 60M --out caches/gpt2-l8

    Continues where it stopped if it was interrupted.
    """
    settings = read_settings(CacheSettings, config, given)

    from tailrace.pipeline.cache import stage as cache
    from tailrace.pipeline.cache.budget import plan_budget

    if dry_run:
        budget = plan_budget(settings, output=output, compute=compute)
        if as_json:
            options.echo_json(asdict(budget))
        else:
            show_budget(budget)
        return
    result = cache.run(
        settings,
        output=output,
        compile_model=compile_model,
        compute=compute,
    )
    _report(result, compute, as_json=as_json)


def _report(result: CacheResult, compute: Compute, *, as_json: bool, before: ActivationCache | None = None) -> None:
    if as_json:
        counts = {"n_new_rows": result.n_new_rows, "seconds": result.seconds, "warnings": result.warnings}
        echo_made(result.path, **counts)
    elif not compute.quiet:
        show_result(result, before)


def _added(cache: ActivationCache, before: ActivationCache | None) -> str:
    """Return what a cache holds more than ``before``."""
    if before is None:
        return ""
    more = cache.split("train").n_rows - before.split("train").n_rows
    sites = [site for site in cache.sites if site not in before.sites]
    added = [f"+{more:,} rows"] * (more > 0) + [f"+{', '.join(sorted(sites, key=by_number))}"] * bool(sites)
    return "; " + ("; ".join(added) or "nothing to add")


def show_result(result: CacheResult, before: ActivationCache | None = None) -> None:
    """Print what a cache holds now, and what of it was added since ``before``."""
    from tailrace.storage.cache_format import SPLITS

    splits = result.cache.manifest.splits
    rows = ", ".join(f"{splits[name].n_rows:,} {name} rows" for name in SPLITS if name in splits)
    rate = f" ({result.n_new_rows / result.seconds:,.0f} rows/s)" if result.seconds else ""
    sites = ", ".join(sorted(result.cache.sites, key=by_number))
    click.echo(f"{result.path}: {rows} of {sites}{_added(result.cache, before)}{rate}")
    if files := result.cache.manifest.text.get("files"):
        size = units.size(sum(file["bytes"] for file in files))
        names = ", ".join([*(file["name"] for file in files[:3]), *(["…"] if len(files) > 3 else [])])
        click.echo(f"text: {len(files):,} file{'s' * (len(files) > 1)}, {size}: {names}")
    for warning in result.warnings:
        click.echo(f"warning: {warning}", err=True)


def show_budget(budget: Budget) -> None:
    """Print what a cache would cost."""
    from tailrace.pipeline.cache.budget import STORAGE_DTYPES

    rows = "the whole dataset" if budget.n_rows is None else f"{budget.n_rows:,} rows"
    click.echo(f"{rows} of {', '.join(site.name for site in budget.sites)}, shards of {budget.shard_rows:,} rows")
    hours = "" if budget.hours is None else f": about {units.duration(3600 * budget.hours)} in one process"
    click.echo(f"{budget.rows_per_second:,.0f} rows/s measured{hours}")
    for dtype in STORAGE_DTYPES:
        total = budget.total_bytes(dtype)
        all_rows = "" if total is None else f", {units.size(total)} in all"
        if total is not None and total > budget.free_bytes:
            all_rows += ", which does not fit"
        click.echo(f"  {dtype:9} {budget.row_bytes[dtype]:,} bytes per row{all_rows}")
    click.echo(f"{budget.free_bytes / 1e9:.1f} GB free; nothing was written")


@click.command("extend", cls=SectionCommand)
@click.argument("cache", type=options.ARTIFACT)
@click.option(
    "--tokens",
    required=True,
    help="Training rows the cache shall hold in the end, such as 120M, or all.",
)
@options.model_moved
@click.option("--dataset", help="Where the dataset lies now, if it moved since the cache was made.")
@click.option("--on-bad-row", type=click.Choice(["fail", "skip"]), help="As of pipeline cache.  [default: fail]")
@options.as_json
@options.compute
def extend(
    cache: Path,
    tokens: str,
    model: str | None,
    dataset: str | None,
    on_bad_row: str | None,
    as_json: bool,
    compute: Compute,
) -> None:
    """Add training rows to CACHE, continuing its text where it stopped."""
    from tailrace.pipeline.cache import stage
    from tailrace.storage.activation_cache import open_cache

    try:
        n_rows: int | Literal["all"] = "all" if tokens == "all" else int(parse_quantity(tokens))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--tokens") from error
    before = open_cache(cache)
    result = stage.extend(cache, n_rows, compute=compute, model=model, dataset=dataset, on_bad_row=on_bad_row)
    _report(result, compute, as_json=as_json, before=before)


@click.command("widen", cls=SectionCommand)
@click.argument("cache", type=options.ARTIFACT)
@click.option("--layers", help="Layers to add, such as 4,5 or all.")
@click.option("--hooks", multiple=True, help="Sites to add by hook names, as of pipeline cache. May be repeated.")
@options.model_moved
@options.as_json
@options.compute
def widen(
    cache: Path,
    layers: str | None,
    hooks: tuple[str, ...],
    model: str | None,
    as_json: bool,
    compute: Compute,
) -> None:
    """Add layers to CACHE for the rows it holds, by running its recorded contexts again."""
    from tailrace.pipeline.cache import stage
    from tailrace.storage.activation_cache import open_cache

    before = open_cache(cache)
    result = stage.widen(cache, layers, hooks, compute=compute, model=model)
    _report(result, compute, as_json=as_json, before=before)


@click.command("shuffle", cls=SectionCommand)
@click.argument("cache", type=options.ARTIFACT)
@options.generation
@click.option("--epoch", type=click.IntRange(min=0), default=0, show_default=True, help="Epoch whose order is written.")
@click.option("--seed", type=int, help="Seed of the epochs; by default the cache's.")
@click.option("--split", type=click.Choice(["train", "heldout"]), default="train", show_default=True, help="Rows.")
@options.as_json
@options.computing(options.workers, options.quiet)
def shuffle(cache: CachePath, epoch: int, seed: int | None, split: str, as_json: bool, compute: Compute) -> None:
    """Write the shuffled order of one epoch of CACHE as sequential shards.

    Not needed for training: an epoch is shuffled while it is read. Worth it with little memory, a slow disk, or many
    readers, at the price of the cache's size on disk.
    """
    from tailrace.pipeline.cache.shuffle import run

    path = run(cache, epoch=epoch, seed=seed, split=split, compute=compute)
    if as_json:
        echo_made(path)
    elif not compute.quiet:
        click.echo(f"{path}: training reads epoch {epoch} from here")


def _parse_share(_: click.Context, option: click.Parameter, text: str) -> float:
    """Return ``1%`` or 0.01 as a number; raise BadParameter for what is no share of a whole."""
    try:
        share = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise click.BadParameter(f"{text!r} is no share; give more than 0 and at most 100%, such as 1%", param=option)
    return share


@click.command("verify", cls=SectionCommand)
@click.argument("path", type=options.ARTIFACT)
@click.option("--checksums/--no-checksums", default=True, help="Re-read every byte. [default: yes]")
@click.option(
    "--pairs", type=click.IntRange(min=0), default=8, show_default=True, help="Contexts to run again; 0: none."
)
@click.option(
    "--sample",
    callback=_parse_share,
    default="100%",
    metavar="SHARE",
    show_default=True,
    help="Share of all files to read, such as 1%; of the others the sizes are compared.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Which files a sample reads.")
@click.option("--shuffle", is_flag=True, help="Report whether the order looks like a uniformly random permutation.")
@click.option("--batch-rows", type=click.IntRange(min=2), help="Batch of that report; 4096 unless there are few rows.")
@click.option("--epoch", type=click.IntRange(min=0), default=0, show_default=True, help="Epoch of that report.")
@options.generation_number
@options.model_moved
@options.as_json
@options.compute
def verify(
    path: Path,
    checksums: bool,
    pairs: int,
    sample: float,
    seed: int,
    shuffle: bool,
    batch_rows: int | None,
    epoch: int,
    generation: int | None,
    model: str | None,
    as_json: bool,
    compute: Compute,
) -> None:
    """Check the artifact at PATH, or all in a folder; exit with 1 if anything is wrong.

    Every artifact's bytes are compared with their checksums, of a cache those of all generations. Of a cache alone,
    some recorded contexts are also run through the language model again and compared with their stored rows.

    \b
    pipeline verify caches/gpt2
    pipeline verify .
    pipeline verify caches/gpt2 --sample 1% --seed 7
    """
    from tailrace.pipeline.cache.verify import holds_others, run

    is_folder, is_quiet = holds_others(path), as_json or compute.quiet
    done = run(
        path,
        checksums=checksums,
        pairs=pairs,
        shuffle=shuffle,
        batch_rows=batch_rows,
        epoch=epoch,
        generation=generation,
        model=model,
        sample=sample,
        seed=seed,
        compute=compute,
        finished=(lambda _: None) if is_quiet else show_artifact if is_folder else show_check,
    )
    damage = [*done.damage, *(problem for one in done.inside for problem in one.damage)]
    problems = [*damage, *(_line(report) for report in done.pairs if not report.passed)]
    if done.shuffle is not None and not done.shuffle.passed:
        problems.append("the order does not look like a uniformly random permutation")
    if as_json:
        options.echo_json({**asdict(done), "passed": done.passed, "problems": problems})
        sys.exit(0 if done.passed else 1)
    if is_folder and not is_quiet:
        show_sum(done)
    if done.sampled and not is_quiet:
        click.echo(done.sampled)
    if is_folder and not done.inside:
        problems.append(f"nothing was checked: no artifact in {path} was finished")
    _finish(problems, is_quiet=is_quiet, is_damaged=bool(damage))


def show_artifact(check: Verification) -> None:
    """Print what the check of an artifact in a folder has shown."""
    n_problems = len(check.damage)
    damage = f", {n_problems} problem{'s' * (n_problems > 1)}" if n_problems else ""
    _say(not check.damage, f"{check.path}: {check.kind or 'unknown kind'}{damage}")


def show_sum(check: Verification) -> None:
    """Print how many artifacts of a folder were checked, and those that were never finished."""
    for path in check.unfinished:
        click.echo(f"--   {path}: was never finished, and is not checked")
    n_damaged = sum(not one.passed for one in check.inside)
    checked = f"{len(check.inside):,} artifact{'s' * (len(check.inside) != 1)} checked"
    click.echo(f"{checked}, {n_damaged:,} damaged, {len(check.unfinished):,} never finished")


def show_check(check: Verification) -> None:
    """Print what one check of a cache check."""
    for report in check.pairs:
        _say(report.passed, _line(report))
    if check.shuffle is not None:
        show_evidence(check.shuffle)
    if not check.pairs and check.shuffle is None:
        n_problems = f"{len(check.damage)} problem{'s' if len(check.damage) > 1 else ''}"
        _say(not check.damage, f"checksums: {n_problems if check.damage else 'every byte as written'}")


def _line(report: PairingReport) -> str:
    mlp = "" if report.is_mlp else ", pairing check not applicable"
    if report.mlp_relative_error is not None:
        mlp = f", MLP(in) against out {report.mlp_relative_error:.1e}"
    return (
        f"pairs: {report.split} {report.site}/{report.side}, {report.n_rows:,} rows against the model run again: "
        f"relative error {report.relative_error:.1e} (at most {report.tolerance:.1e} expected){mlp}"
    )


def show_evidence(evidence: ShuffleEvidence) -> None:
    """Print each statistic beside its range for a true permutation."""
    click.echo(
        f"shuffle: {evidence.n_rows:,} rows in batches of {evidence.batch_rows:,}, {evidence.n_documents:,} documents"
    )
    for statistic in evidence.statistics:
        line = (
            f"  {statistic.name}: {statistic.value:.5g}; a true permutation gives {statistic.expected:.5g} "
            f"[{statistic.null_low:.5g}, {statistic.null_high:.5g}], p = {statistic.p_value:.3f}"
        )
        _say(statistic.within_null, line)


def _say(passed: bool, line: str) -> None:
    click.echo(f"{'ok  ' if passed else 'FAIL'} {line}")


def _finish(problems: list[str], *, is_quiet: bool, is_damaged: bool) -> None:
    for problem in problems:
        click.echo(f"problem: {problem}", err=True)
    if is_damaged:
        click.echo("restore these files, or delete what is damaged and make it again", err=True)
    if problems:
        sys.exit(1)
    if not is_quiet:
        click.echo("verified")
