"""``pipeline doctor``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.shared.options import read_settings
from tailrace.pipeline.shared.sections import SectionCommand
from tailrace.training.loop.settings import TrainSettings

if TYPE_CHECKING:
    from tailrace.pipeline.doctor.stage import Report
    from tailrace.storage.generations import CachePath


@click.command("doctor", cls=SectionCommand)
@click.argument("cache", type=options.ARTIFACT, required=False)
@options.generation
@click.option("--site", help="Site of CACHE, where it has several.")
@click.option("--d-sae", metavar="N", help="Features of the transcoder; by default 32 times the width.")
@click.option("--config", type=options.FILE, help="YAML file with settings of pipeline train.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, which has everything.")
@options.computing(options.device, options.threads)
def command(cache: CachePath | None, config: Path | None, as_json: bool, compute: Compute, **given: Any) -> None:
    """Show what this machine has and reaches, and what would limit training from CACHE.

    Measures for about ten seconds: the disk, products, copies to a GPU and, with a cache, reading and training steps. A
    report of a fault is best with its output.

    \b
    pipeline doctor
    pipeline doctor caches/gpt2-l8 --d-sae 24576
    """
    settings = read_settings(TrainSettings, config, given)

    from dataclasses import replace

    from tailrace.pipeline.doctor import stage

    report = stage.run(cache=cache, settings=settings, compute=replace(compute, quiet=True))
    if as_json:
        click.echo(report.model_dump_json(indent=2))
        return
    for line in _lines(report):
        click.echo(line)


def _lines(report: Report) -> Iterator[str]:
    rates, limits = report.rates, report.limits
    yield f"versions   Python {report.python}, " + ", ".join(
        f"{name} {number or 'not installed'}" for name, number in report.versions.items()
    )
    yield f"system     {report.system}"
    yield (
        f"processor  {report.cores} cores, {report.threads} threads; memory {report.free_memory_bytes / 1e9:.1f} of "
        f"{report.memory_bytes / 1e9:.1f} GB free"
    )
    for gpu in report.gpus:
        yield (
            f"cuda:{gpu.index}     {gpu.name}, capability {gpu.capability}, {gpu.free_bytes / 1e9:.1f} of "
            f"{gpu.total_bytes / 1e9:.1f} GB free; torch is for CUDA {report.cuda}; {report.driver}"
        )
    yield f"device     {report.device}; precision auto is {report.precision}"
    yield f"products   float32 {rates.float32 / 1e12:.3g}, bfloat16 {rates.bfloat16 / 1e12:.3g} TFLOP/s"
    yield f"disk       {rates.disk / 1e9:.2f} GB/s read, {report.disk_free_bytes / 1e9:.1f} GB free"
    if rates.copy_pinned is not None and rates.copy_pageable is not None:
        yield f"copies     {rates.copy_pinned / 1e9:.1f} GB/s pinned, {rates.copy_pageable / 1e9:.1f} pageable"
    if limits is not None:
        yield (
            f"training   {limits.cache}, {limits.site}: {limits.row_bytes:,} bytes a row, {limits.d_sae:,} features, "
            f"at least {limits.needed_bytes / 1e9:.2f} GB"
        )
        yield f"limit      {limits.sentence()}"
    for note in report.notes:
        yield f"note       {note}"
