"""The command ``pipeline``. Every command is a thin call of a stage's function, loaded only when it is used."""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any, NamedTuple

import click
from click.shell_completion import CompletionItem

from tailrace.storage.errors import ActionableError


class Command(NamedTuple):
    """A command: the module that holds it as ``command``, and its line in the list of commands."""

    module: str
    line: str


COMMANDS = {
    "cache": Command(
        "tailrace.pipeline.cache.command", "Text in, a shuffled on-disk cache of MLP inputs and outputs out."
    ),
    "extend": Command("tailrace.pipeline.cache.command_extend", "Add rows to a cache."),
    "widen": Command("tailrace.pipeline.cache.command_widen", "Add layers to a cache, for the same rows."),
    "shuffle": Command(
        "tailrace.pipeline.cache.command_shuffle", "Write one epoch's order as sequential shards (optional)."
    ),
    "verify": Command("tailrace.pipeline.cache.command_verify", "Check bytes, pairs and shuffle of a cache."),
    "info": Command("tailrace.pipeline.artifacts.info_command", "Show any artifact at a glance."),
    "train": Command("tailrace.pipeline.train.command", "Train a transcoder from a cache, without the language model."),
    "analyze": Command("tailrace.pipeline.analyze.command", "Turn a transcoder into tables of features and examples."),
    "evaluate": Command(
        "tailrace.pipeline.evaluate.command", "Run the language model with transcoders in place of its MLPs."
    ),
    "pareto": Command(
        "tailrace.pipeline.evaluate.command_pareto", "Draw L0 against FVU or CE recovered of many transcoders."
    ),
    "export": Command(
        "tailrace.pipeline.formats.command_export", "Write transcoders and tables in the formats of other tools."
    ),
    "import": Command("tailrace.pipeline.formats.command_import", "Take over a transcoder that another tool made."),
    "blind": Command("tailrace.pipeline.blind.command", "Judge features without knowing whose they are."),
    "query": Command("tailrace.pipeline.query.command", "Ask tables, a sweep or an evaluation in SQL."),
    "score": Command("tailrace.pipeline.score.command", "Show what features make of a text, token by token."),
    "circuit": Command("tailrace.pipeline.circuit.command", "Explain a feature or a predicted token on one prompt."),
    "task": Command("tailrace.pipeline.task.command", "Find the features that do a task, from prompts with answers."),
    "circuits-model": Command(
        "tailrace.pipeline.train.command_layer_set", "Train a transcoder for every layer of a model."
    ),
    "dashboard": Command("tailrace.pipeline.dashboard.command", "Write a static site of feature pages."),
    "serve": Command(
        "tailrace.pipeline.dashboard.command_serve", "Show a dashboard over HTTP, or tables without making one."
    ),
    "demo": Command("tailrace.pipeline.demo.command", "Run everything on a small real model and show the result."),
}


class LazyGroup(click.Group):
    """Loads a command's module only when the command is used: `pipeline query` needs no torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the commands in the order data flows through them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Return a command, or None if there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name].module).command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Find the command that was typed; a wrong name is answered with the right ones."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(f"no command {args[0]!r}; there are {', '.join(COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Offer commands without loading them; options are click's business."""
        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        return [
            CompletionItem(name, help=command.line) for name, command in COMMANDS.items() if name.startswith(incomplete)
        ]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the list of commands without loading any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.line) for name, command in COMMANDS.items()])


# help is as wide as the terminal: click would stop at 80
@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": sys.maxsize})
@click.version_option(package_name="tailrace", prog_name="pipeline")
@click.option("--debug", is_flag=True, help="Show tracebacks and debugging output.")
@click.option("--log-level", default="warning", type=click.Choice(["debug", "info", "warning", "error"]))
@click.pass_context
def cli(context: click.Context, debug: bool, log_level: str) -> None:
    """From text to trained transcoders through an on-disk activation cache."""
    context.obj = {"debug": debug}
    level = logging.DEBUG if debug else getattr(logging, log_level.upper())
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; errors a user can act on are printed without a traceback and exit with 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        cli.main(args=arguments, prog_name="pipeline", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped; run the same command again to continue", err=True)
        sys.exit(130)
    except ActionableError as error:
        if "--debug" in arguments:
            raise
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
