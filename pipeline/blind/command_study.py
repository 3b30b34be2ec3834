"""``pipeline blind study``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from tailrace.analysis.blind.withholding import Mode, Source
from tailrace.pipeline.blind.settings import OUTCOMES, Outcome
from tailrace.pipeline.shared import run_options as options
from tailrace.storage.errors import SettingsError
from tailrace.storage.parsing import parse_json, read_text

if TYPE_CHECKING:
    from tailrace.pipeline.blind.study import BlindStudy

DIRECTORY = click.argument("directory", metavar="DIR", type=options.ARTIFACT)


@click.group("study", short_help="Say what a feature is about before seeing its texts.")
def study() -> None:
    """Say what a feature is about before seeing what it fires on; everything seen is on file.

    \b
    pipeline blind study begin studies/a --tables tables/gpt2-l8 --seed 3
    pipeline blind study view studies/a 1
    pipeline blind study hypothesis studies/a "semicolons between references"
    pipeline blind study reveal studies/a
    pipeline blind study view studies/a 1
    pipeline blind study verdict studies/a right
    """


@study.command("begin")
@DIRECTORY
@click.option(
    "--tables", type=options.ARTIFACT, required=True, help="Tables of the feature's dictionary, or a folder of some."
)
@click.option("--feature", help="Feature to study, in a folder of tables layer8:89; by default a random live one.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Decides the random one.")
@click.option(
    "--mode",
    type=click.Choice(get_args(Mode)),
    default="blind",
    show_default=True,
    help="super-blind withholds active features of a layer-0 transcoder too.",
)
def begin(directory: Path, tables: Path, feature: str | None, seed: int, mode: Mode) -> None:
    """Open a ledger at DIR, with the evidence that tables hold."""
    from tailrace.pipeline.blind.study import begin_from_tables

    begun = begin_from_tables(directory, tables, feature=feature, mode=mode, seed=seed)
    subject = begun.entries()[0]["subject"]
    click.echo(f"{directory}: {mode} study of feature {subject['feature']} of {subject['site']}")
    _echo_evidence(begun)


@study.command("add")
@DIRECTORY
@click.argument("file", type=options.FILE)
@click.option("--kind", required=True, help="What it is, such as paths.")
@click.option(
    "--source",
    type=click.Choice(get_args(Source)),
    required=True,
    help="input: seen on a text, whose words are withheld. weights: the same whatever the text.",
)
@click.option("--about", default="", help="A line to show for it.")
def add(directory: Path, file: Path, kind: str, source: Source, about: str) -> None:
    """Seal FILE, any JSON, as evidence."""
    try:
        content = parse_json(read_text(file))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{file}: cannot be read as JSON ({error}); check the path") from error
    one = _open(directory).add(kind, content, source=source, about=about)
    click.echo(f"evidence {one.number} is sealed; delete {file} if you must not see it")


@study.command("view")
@DIRECTORY
@click.argument("number", type=int)
def view(directory: Path, number: int) -> None:
    """Show evidence NUMBER of DIR as JSON, without what is withheld, and put that on file."""
    click.echo(json.dumps(_open(directory).view(number), indent=1, ensure_ascii=False))


@study.command("note")
@DIRECTORY
@click.argument("text")
def note(directory: Path, text: str) -> None:
    """Put a remark on file."""
    _open(directory).note(text)


@study.command("hypothesis")
@DIRECTORY
@click.argument("text")
def hypothesis(directory: Path, text: str) -> None:
    """Put on file what the feature is about; the last one before the reveal counts."""
    _open(directory).hypothesise(text)


@study.command("reveal")
@DIRECTORY
def reveal(directory: Path) -> None:
    """Open all evidence; refused until a hypothesis is on file."""
    _open(directory).reveal()
    click.echo("revealed: view the evidence again, then give your verdict")


@study.command("verdict")
@DIRECTORY
@click.argument("outcome", type=click.Choice(OUTCOMES))
@click.argument("text", default="")
def verdict(directory: Path, outcome: Outcome, text: str) -> None:
    """Put on file whether the hypothesis was right, after the reveal."""
    _open(directory).conclude(outcome, text)


@study.command("log")
@DIRECTORY
def log(directory: Path) -> None:
    """Check the ledger of DIR and show what happened."""
    opened = _open(directory)
    for entry in opened.entries():
        click.echo(f"{entry['time']}  {_line(entry)}")
    _echo_evidence(opened)


def _open(directory: Path) -> BlindStudy:
    from tailrace.pipeline.blind.study import BlindStudy

    return BlindStudy(directory)


def _echo_evidence(opened: BlindStudy) -> None:
    for one in opened.evidence():
        click.echo(f"evidence {one.number}: {one.kind}, from the {one.source}; {one.about}".rstrip("; "))


def _line(entry: dict[str, Any]) -> str:
    match entry["event"]:
        case "begin":
            return f"begin, {entry['mode']}, {entry['subject']}"
        case "evidence":
            return f"evidence added: {entry['kind']}"
        case "view":
            return f"viewed evidence {entry['evidence']} ({entry['kind']})" + (", opened" if entry["revealed"] else "")
        case "verdict":
            return f"verdict: {entry['outcome']} {entry['text']}".rstrip()
        case "reveal":
            return "reveal"
    return f"{entry['event']}: {entry['text']}"
