"""``pipeline verify``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared.sections import SectionCommand

if TYPE_CHECKING:
    from tailrace.pipeline.cache.verify import PairingReport, Verification
    from tailrace.storage.shuffle_evidence import ShuffleEvidence


@click.command("verify", cls=SectionCommand)
@click.argument("path", type=options.ARTIFACT)
@click.option("--checksums/--no-checksums", default=True, help="Re-read every byte. [default: yes]")
@click.option(
    "--pairs", type=click.IntRange(min=0), default=8, show_default=True, help="Contexts to run again; 0: none."
)
@click.option("--shuffle", is_flag=True, help="Report whether the order looks like a uniformly random permutation.")
@click.option("--batch-rows", type=click.IntRange(min=2), help="Batch of that report; 4096 unless there are few rows.")
@click.option("--epoch", type=click.IntRange(min=0), default=0, show_default=True, help="Epoch of that report.")
@options.model_moved
@options.device
@options.threads
@options.quiet
def command(
    path: Path,
    checksums: bool,
    pairs: int,
    shuffle: bool,
    batch_rows: int | None,
    epoch: int,
    model: str | None,
    device: str,
    threads: int | None,
    quiet: bool,
) -> None:
    """Check the artifact at PATH; exit with 1 if anything is wrong.

    Every artifact's bytes are compared with their checksums. Of a cache, some recorded contexts are also run through
    the language model again and compared with their stored rows.
    """
    from tailrace.pipeline.cache import verify
    from tailrace.storage.cache_format import KIND

    if (kind := verify.kind_of(path)) != KIND:
        click.echo(f"{path}: comparing every file of the {kind} with its checksum")
    done = verify.run(
        path,
        checksums=checksums,
        pairs=pairs,
        shuffle=shuffle,
        batch_rows=batch_rows,
        epoch=epoch,
        model=model,
        device=device,
        threads=threads,
        quiet=quiet,
        finished=show,
    )
    problems = [*done.damage, *(_line(report) for report in done.pairs if not report.passed)]
    if done.shuffle is not None and not done.shuffle.passed:
        problems.append("the order does not look like a uniformly random permutation")
    _finish(problems)


def show(found: Verification) -> None:
    """Print what one check of a cache found."""
    for report in found.pairs:
        _say(report.passed, _line(report))
    if found.shuffle is not None:
        show_evidence(found.shuffle)
    if not found.pairs and found.shuffle is None:
        n_problems = f"{len(found.damage)} problem{'s' if len(found.damage) > 1 else ''}"
        _say(not found.damage, f"checksums: {n_problems if found.damage else 'every byte as written'}")


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


def _finish(problems: list[str]) -> None:
    for problem in problems:
        click.echo(f"problem: {problem}", err=True)
    if problems:
        sys.exit(1)
    click.echo("verified")
