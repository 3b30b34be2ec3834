"""Pages of the site that are made while it is built: the command line from its commands, tutorials from notebooks.

``mkdocs.yml`` names this file as a hook. Made pages do not lie in the repository, so they cannot fall behind it.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tailrace.pipeline.cli import GROUPS, cli
from tailrace.pipeline.shared.sections import HELP_ALL

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

COMMAND_LINE = "reference/command-line.md"
_DATA_FRAME = ' border="1" class="dataframe"'
NOTEBOOKS = Path(__file__).parents[1] / "notebooks"

_INTRODUCTION = """\
# Command line

`pipeline COMMAND`; `tailrace COMMAND` is the same. `pipeline COMMAND --help` shows what follows in the terminal; of the
commands with many settings it shows the first ones, and `--help-all` all of them.

Every setting can also stand in a YAML file for `--config`, under its flag's name with `_` for `-`; flags override the
file.

Completion in the shell: `eval "$(_PIPELINE_COMPLETE=bash_source pipeline)"` (or `zsh_source`; `fish_source` with
`| source`).
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the made pages."""
    from mkdocs.structure.files import File

    made = {COMMAND_LINE: command_line()}
    made |= {f"notebooks/{path.stem}.md": tutorial(path) for path in sorted(NOTEBOOKS.glob("*.ipynb"))}
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Let links to notebooks, which a reader of the repository wants, lead to the pages made of them."""
    return re.sub(r"(\]\([\w/.]+)\.ipynb\)", r"\1.md)", markdown)


def command_line() -> str:
    """Return the page of all commands, with the sections of their help."""
    parts = [_INTRODUCTION]
    root = click.Context(cli, info_name="pipeline")
    for group, names in GROUPS.items():
        parts.append(f"## {group}\n")
        for name in names:
            command = cli.get_command(root, name)
            assert command is not None
            parts += _command(command, click.Context(command, info_name=name, parent=root))
    return "\n".join(parts)


def _command(command: click.Command, context: click.Context) -> Iterator[str]:
    context.meta[HELP_ALL] = True
    formatter = MarkdownHelp()
    yield f"### {context.command_path} {{ #{context.command_path.replace(' ', '-')} }}\n"
    command.format_help(context, formatter)
    yield formatter.getvalue()
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from _command(inner, click.Context(inner, info_name=name, parent=context))


class MarkdownHelp(click.HelpFormatter):
    """Takes what a command writes for the terminal as Markdown: lists become tables, examples code."""

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:  # noqa: ARG002
        """Write how the command is called."""
        self.write(f"```text\n{prog} {args}\n```\n\n")

    def write_text(self, text: str) -> None:
        """Write paragraphs; those that keep their line breaks are examples."""
        for paragraph in inspect.cleandoc(text).split("\n\n"):
            if paragraph.startswith("\b"):
                example = paragraph.removeprefix("\b\n")
                language = "bash" if example.startswith("pipeline") else "text"
                self.write(f"```{language}\n{example}\n```\n\n")
            else:
                self.write(_text(" ".join(paragraph.split())) + "\n\n")

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:  # noqa: ARG002
        """Write names and what they mean."""
        self.write("| | |\n|---|---|\n")
        for name, about in rows:
            self.write(f"| {_option(name)} | {_text(' '.join(about.split()))} |\n")
        self.write("\n")

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Write a heading above what the block writes."""
        self.write(f"**{name}**\n\n")
        yield


def _option(written: str) -> str:
    names, _, values = re.sub(r"\s+", " ", written.strip()).partition(" ")
    if names.endswith(","):  # -h, --help
        return f"`{written.strip()}`"
    shown = f"`{names}`"
    return shown if not values else f"{shown} {_text(values.replace('|', ' | ') if '[' in values else values)}"


def _text(words: str) -> str:
    """Escape what Markdown would take for its own."""
    pieces = re.split(r"(`[^`]*`)", words)
    plain = [re.sub(r"([*_<\[\]|])", r"\\\1", piece) if i % 2 == 0 else piece for i, piece in enumerate(pieces)]
    return "".join(plain)


def tutorial(path: Path) -> str:
    """Return a notebook as Markdown: its text, its code, and what the code printed."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [_output(output) for output in cell.get("outputs", [])]
    heading, _, rest = "\n\n".join(parts).partition("\n")
    return f'{heading}\n\n<a href="{path.name}" download>Download this notebook</a>\n{rest}\n'


def _output(output: dict[str, Any]) -> str:
    """Return what a cell printed as a block of text, what it showed as HTML."""
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text']).rstrip()}\n```"
    html = "".join(output["data"]["text/html"])
    # in one line, which Markdown passes on as it is; without a class, a table gets the theme's looks
    return f'<div markdown="0">{" ".join(html.replace(_DATA_FRAME, "").split())}</div>'
