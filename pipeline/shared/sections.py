"""A command's help in sections: the settings that people change first, then all others under headings."""

from __future__ import annotations

from collections.abc import Collection
from copy import copy
from functools import partial
from typing import Any

import click

RUNNING = "How to run"
"""Heading of what decides nothing about a result."""
LONG = 25
"""A command with more options than this shows the first ones only, unless all are asked for."""

ALIASES: dict[str, tuple[str, ...]] = {
    "output": ("out",),
    "transcoder": ("transcoders",),
    "table": ("tables",),
    "features": ("feature",),
    "tokens": ("rows",),
    "rows": ("tokens",),
    "training_tokens": ("tokens", "rows"),
    "batch_size": ("batch_rows", "contexts_per_batch", "prompts_per_batch"),
    "learning_rate": ("lr",),
    "optimizer": ("optimiser",),
    "normalization": ("normalisation",),
    "n_features": ("d_sae",),
    "expansion_factor": ("expansion",),
    "layer": ("layers",),
    "hook": ("hooks",),
    "context_size": ("context_length",),
    "text_column": ("column",),
    "logit_diff": ("logit_difference",),
    "wandb_project": ("wandb",),
}
"""Other names of flags and settings, which help does not show: former ones, and what other tools call the same.

Each stands for the first of the names behind it that a command has, unless the command has a flag of that name."""

_FIRST_COLUMN = 28
HELP_ALL = "help-all"
"""Key in a context's ``meta``: set where all settings are shown."""


def current_name(written: str, known: Collection[str]) -> str:
    """Return the name among ``known`` that a name stands for; itself if it is known, or stands for none."""
    return written if written in known else next((name for name in ALIASES.get(written, ()) if name in known), written)


class SectionOption(click.Option):
    """An option that knows the heading it stands under; one without a heading stands before all headings."""

    def __init__(self, *names: Any, section: str | None = None, **attributes: Any) -> None:
        super().__init__(*names, **attributes)
        self.section = section

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return name and help; a setting that is on or off is written ``--[no-]name``."""
        record = super().get_help_record(ctx)
        if record is None or not self.secondary_opts:
            return record
        return f"--[no-]{self.opts[0].removeprefix('--')}", record[1]


option = partial(click.option, cls=SectionOption)
"""``click.option`` that takes a ``section``."""
running = partial(option, section=RUNNING)
"""An option under the heading ``RUNNING``."""


class SectionCommand(click.Command):
    """A command whose help has sections. A long one shows the first of them, and all with ``--help-all``."""

    def __init__(self, *arguments: Any, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.is_long = sum(getattr(one, "section", "") != RUNNING for one in self.params) > LONG
        self.params.append(
            click.Option(
                ["--help-all"], is_flag=True, is_eager=True, expose_value=False, callback=_show_all,
                hidden=not self.is_long, help="Show all settings and exit.",
            )
        )  # fmt: skip

    def make_parser(self, ctx: click.Context) -> Any:
        """Return click's parser, which takes the other names of the options too."""
        parser = super().make_parser(ctx)
        flags = {_name(flag): one for one in self.get_params(ctx) for flag in one.opts if isinstance(one, click.Option)}
        for alias in ALIASES:
            if (name := current_name(alias, flags)) != alias:
                also = copy(flags[name])
                also.opts, also.secondary_opts = ["--" + alias.replace("_", "-")], []
                also.add_to_parser(parser, ctx)
        return parser

    def sections(self, ctx: click.Context) -> dict[str, list[tuple[str, str]]]:
        """Return names and help of all options by heading: first what has none, last how to run."""
        first = "Basics" if self.is_long else "Options"
        found: dict[str, list[tuple[str, str]]] = {first: []}
        for one in self.get_params(ctx):
            record = None if isinstance(one, click.Argument) else one.get_help_record(ctx)
            if record is not None:
                found.setdefault(getattr(one, "section", None) or first, []).append(record)
        running = found.pop(RUNNING, None)
        return found if running is None else {**found, RUNNING: running}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under their headings; of a long command the first ones, and the other headings."""
        sections = self.sections(ctx)
        more = [] if ctx.meta.get(HELP_ALL) or not self.is_long else [one for one in [*sections][1:] if one != RUNNING]
        write_sections({name: sections[name] for name in sections if name not in more}, formatter)
        if more:
            n_more = sum(len(sections[name]) for name in more)
            with formatter.section(f"{n_more} more with {ctx.command_path} --help-all"):
                formatter.write_text(", ".join(dict.fromkeys(name.partition(":")[0] for name in more)))


def write_sections(sections: dict[str, list[tuple[str, str]]], formatter: click.HelpFormatter) -> None:
    """Write names and what they mean below their headings, with one width of the first column for all."""
    lengths = [len(name) for rows in sections.values() for name, _ in rows]
    width = max((length for length in lengths if length <= _FIRST_COLUMN), default=0)
    for heading, rows in sections.items():
        with formatter.section(heading):
            formatter.write_dl([(name.ljust(width), about) for name, about in rows], col_max=width)


def _name(flag: str) -> str:
    """Return a flag's name as Python writes it."""
    return flag.removeprefix("--").replace("-", "_")


def _show_all(ctx: click.Context, param: click.Parameter, value: bool) -> None:  # noqa: ARG001
    if value and not ctx.resilient_parsing:
        ctx.meta[HELP_ALL] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()
