"""The command ``pipeline``. Every command is a thin call of a stage's function, loaded only when it is used.

A command's module imports its settings, which need no library that takes long to load, and the stage inside its
function, once the settings are read: help, completion and wrong flags are answered in a quarter of a second.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import logging
import os
import platform
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from typing import Any, NamedTuple, NoReturn

import click
from click.shell_completion import CompletionItem

from tailrace.pipeline.shared.sections import write_sections
from tailrace.pipeline.shared.units import WIDEST
from tailrace.storage.errors import ActionableError, SettingsError


class Command(NamedTuple):
    """A command: the module that holds it, its line in the list of commands, and its name in the module."""

    module: str
    line: str
    attribute: str = "command"


GROUPS = {
    "Data": {
        "cache": Command(
            "tailrace.pipeline.cache.command", "Text in, a shuffled on-disk cache of MLP inputs and outputs out."
        ),
        "extend": Command("tailrace.pipeline.cache.command", "Add rows to a cache.", "extend"),
        "widen": Command("tailrace.pipeline.cache.command", "Add layers to a cache, for the same rows.", "widen"),
        "shuffle": Command(
            "tailrace.pipeline.cache.command", "Write one epoch's order as sequential shards (optional).", "shuffle"
        ),
        "verify": Command(
            "tailrace.pipeline.cache.command", "Check artifacts' bytes; of a cache, pairs too.", "verify"
        ),
        "ls": Command("tailrace.pipeline.artifacts.command_ls", "List the artifacts under a folder."),
        "info": Command("tailrace.pipeline.artifacts.info_command", "Show any artifact at a glance."),
        "prune": Command(
            "tailrace.pipeline.artifacts.command_prune", "Delete what only older generations of a cache need."
        ),
        "rm": Command("tailrace.pipeline.artifacts.command_rm", "Remove artifacts that no others were made from."),
    },
    "Train": {
        "train": Command(
            "tailrace.pipeline.train.command", "Train a transcoder from a cache, without the language model."
        ),
        "circuits-model": Command(
            "tailrace.pipeline.train.command_layer_set", "Train a transcoder for every layer of a model."
        ),
        "curves": Command("tailrace.pipeline.curves.command", "Draw how training went: loss, FVU, L0, dead features."),
    },
    "Look": {
        "analyze": Command(
            "tailrace.pipeline.analyze.command", "Turn a transcoder into tables of features and examples."
        ),
        "query": Command("tailrace.pipeline.query.command", "Ask tables, a sweep or an evaluation in SQL."),
        "label": Command("tailrace.pipeline.label.command", "Give features labels, notes and stars."),
        "compare": Command("tailrace.pipeline.compare.command", "Match the features of two dictionaries."),
        "dashboard": Command("tailrace.pipeline.dashboard.command", "Write a static site of feature pages."),
        "serve": Command(
            "tailrace.pipeline.dashboard.command_serve", "Show a dashboard over HTTP, or tables without making one."
        ),
        "promotes": Command(
            "tailrace.pipeline.query.command_promotes", "Rank features by what they write to a token's logit."
        ),
        "score": Command("tailrace.pipeline.score.command", "Show what features make of a text, token by token."),
    },
    "Explain": {
        "evaluate": Command(
            "tailrace.pipeline.evaluate.command", "Run the language model with transcoders in place of its MLPs."
        ),
        "pareto": Command(
            "tailrace.pipeline.evaluate.command_pareto", "Draw L0 against FVU or CE recovered of many transcoders."
        ),
        "circuit": Command(
            "tailrace.pipeline.circuit.command", "Explain a feature or a predicted token on one prompt."
        ),
        "steer": Command(
            "tailrace.pipeline.steer.command", "Write text with features changed, beside the model's own."
        ),
        "task": Command(
            "tailrace.pipeline.task.command", "Find the features that do a task, from prompts with answers."
        ),
        "blind": Command("tailrace.pipeline.blind.command", "Judge features without knowing whose they are."),
    },
    "Exchange": {
        "export": Command(
            "tailrace.pipeline.formats.command_export", "Write transcoders and tables in the formats of other tools."
        ),
        "import": Command("tailrace.pipeline.formats.command_import", "Take over a transcoder that another tool made."),
    },
    "Try": {
        "demo": Command("tailrace.pipeline.demo.command", "Run everything on a small real model and show the result."),
        "doctor": Command(
            "tailrace.pipeline.doctor.command", "Show what this machine reaches and what would limit it."
        ),
    },
}
"""Every command, under the heading that it stands under."""
COMMANDS = {name: command for commands in GROUPS.values() for name, command in commands.items()}


class LazyGroup(click.Group):
    """Loads a command's module only when the command is used: `pipeline query` needs no torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the commands in the order of their groups."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Return a command, or None if there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse arguments that are no text: neither SQL nor a manifest can hold them."""
        for argument in args:
            try:
                argument.encode()
            except UnicodeEncodeError:
                raise click.UsageError(f"the argument {argument!r} is not UTF-8; write or rename it so", ctx) from None
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Find the command that was typed; a wrong name is answered with the right ones."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(_no_command(args[0]), ctx)
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
        lines = {group: [(name, one.line) for name, one in commands.items()] for group, commands in GROUPS.items()}
        write_sections(lines, formatter)


def _no_command(typed: str) -> str:
    """Return what to say to a name that no command has: the nearest ones, then all."""
    near = " or ".join(difflib.get_close_matches(typed, COMMANDS, n=2))
    lines = [f"  {group}: {', '.join(commands)}" for group, commands in GROUPS.items()]
    return "\n".join([f"no command {typed!r}; {f'did you mean {near}? There' if near else 'there'} are", *lines])


_LIBRARIES = ("torch", "transformers", "transformer_lens", "zarr", "numpy", "pyarrow", "duckdb")


def _show_versions(context: click.Context, _: click.Parameter, asked: bool) -> None:
    """Print what a report of a fault must say: our version, Python and system, and the libraries results depend on."""
    if not asked or context.resilient_parsing:
        return
    click.echo(_versions())
    context.exit()


def _versions() -> str:
    return (
        f"pipeline, version {version('tailrace')}\n"
        f"Python {platform.python_version()}, {platform.platform()}\n"
        + ", ".join(f"{name} {version(name)}" for name in _LIBRARIES)
    )


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDEST})
@click.option(
    *("--version", "versions"),
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_versions,
    help="Show the version, and those of Python and libraries.",
)
@click.option("--debug", is_flag=True, help="Show tracebacks and debugging output.")
@click.option("--log-level", default="warning", type=click.Choice(["debug", "info", "warning", "error"]))
@click.pass_context
def cli(context: click.Context, debug: bool, log_level: str) -> None:
    """From text to trained transcoders through an on-disk activation cache."""
    context.obj = {"debug": debug}
    context.color = _colour()
    level = logging.DEBUG if debug else getattr(logging, log_level.upper())
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    if level == logging.WARNING:  # which step a GPU takes, and whether rows stay on it, is said once a run
        for name in ("tailrace.training.kernels.device", "tailrace.training.rows.device_rows"):
            logging.getLogger(name).setLevel(logging.INFO)


_INTERRUPTED = 130


@contextmanager
def _interrupts_acknowledged() -> Iterator[None]:
    """Inside, Ctrl-C is answered at once, and a second one ends the process whatever it is doing.

    Python raises KeyboardInterrupt in the main thread when what that runs returns, which may be a long product or a
    wait for the disk. A pipe carries the signal to a thread in the meantime. In a destructor or a callback of the
    garbage collector the exception is swallowed; then the thread sees to it that it is raised again.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    before, report = signal.set_wakeup_fd(write, warn_on_full_buffer=False), sys.unraisablehook

    def swallowed(unraisable: Any) -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            os.write(write, _SWALLOWED)
        else:
            report(unraisable)

    sys.unraisablehook = swallowed
    thread = threading.Thread(target=_answer_interrupts, args=(read,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        sys.unraisablehook = report
        signal.set_wakeup_fd(before)
        os.close(write)
        thread.join()
        os.close(read)


_SWALLOWED = b"\0"
_AGAIN_SECONDS = 0.05
"""Until an interrupt that was swallowed is raised again: by then the destructor has ended."""


def _answer_interrupts(pipe: int) -> None:
    n_interrupts = n_again = 0
    while numbers := os.read(pipe, 64):
        for number in numbers:
            if number == _SWALLOWED[0]:
                n_again += 1
                time.sleep(_AGAIN_SECONDS)
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            elif number == signal.SIGINT and n_again:
                n_again -= 1
            elif number == signal.SIGINT:
                n_interrupts += 1
                if n_interrupts == 1:
                    click.echo("stopping after what runs now; Ctrl-C again stops at once", err=True)
                else:
                    os._exit(_INTERRUPTED)  # drafts outlive a lost process, and workers end with it


def _colour() -> bool | None:
    """Return whether to write colours; None leaves it to whether a terminal shows them."""
    return False if os.environ.get("NO_COLOR") else None


def _print_error(message: str) -> None:
    click.echo(f"{click.style('error:', fg='red', bold=True)} {message}", err=True, color=_colour())


def _said(error: click.ClickException) -> str:
    """Return click's message in the words of ours."""
    if isinstance(error, click.NoSuchOption):
        near = " or ".join(error.possibilities or ())
        return f"no such option {error.option_name}" + (f"; did you mean {near}?" if near else "")
    message = error.format_message().rstrip(".")
    return message[:1].lower() + message[1:]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; errors a user can act on are printed without a traceback and exit with 1.

    What is wrong with arguments and settings exits with 2.
    """
    is_program, arguments = arguments is None, sys.argv[1:] if arguments is None else arguments
    try:
        with _interrupts_acknowledged():
            cli.main(args=arguments, prog_name="pipeline", standalone_mode=False)
        if is_program:  # all is done: Ctrl-C while libraries shut down ends the process without a traceback
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    except click.ClickException as error:
        _print_error(_said(error))
        if isinstance(error, click.UsageError) and error.ctx is not None:
            click.echo(f"see {error.ctx.command_path} --help", err=True)
        sys.exit(error.exit_code)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _stop()
    except ActionableError as error:
        if "--debug" in arguments:
            raise
        _print_error(str(error))
        sys.exit(2 if isinstance(error, SettingsError) and not _is_of_disk(error.__cause__) else 1)
    except Exception as error:
        if "--debug" in arguments:
            raise
        if _was_interrupted(error):
            _stop()
        is_of_disk = isinstance(error, OSError) and error.errno is not None
        _print_error(_refused(error) if is_of_disk else _unexpected(error, arguments))
        sys.exit(1 if is_of_disk else _UNEXPECTED)


def _stop() -> NoReturn:
    click.echo("stopped; what is finished is kept: run the same command again to continue", err=True)
    sys.exit(_INTERRUPTED)


def _was_interrupted(error: BaseException | None) -> bool:
    """Return whether Ctrl-C is behind an error: a class that is being made reports it as one of its own."""
    return error is not None and (isinstance(error, KeyboardInterrupt) or _was_interrupted(error.__cause__))


def _is_of_disk(cause: BaseException | None) -> bool:
    """Return whether the system refused a file that is there: its path and settings are not what is wrong."""
    return isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE)


_UNEXPECTED = 70
"""Exit code of a fault of this program, as in sysexits.h."""


def _refused(error: Exception) -> str:
    """Return what the system refused, and how to go on."""
    assert isinstance(error, OSError), "what the system refuses comes as an OSError"
    path = "" if error.filename is None else f"{error.filename}: "
    return (
        f"{path}{error.strerror}. What is finished is kept: put that right, then run the same command again to continue"
    )


def _unexpected(error: Exception, arguments: Sequence[str]) -> str:
    """Return what to do about a fault of this program, whose traceback goes to a file."""
    where = "run the command again with --debug before its name for the traceback"
    with suppress(OSError):
        with tempfile.NamedTemporaryFile("w", prefix="tailrace-fault-", suffix=".txt", delete=False) as file:
            file.write(f"{shlex.join(['pipeline', *arguments])}\n{_versions()}\n\n")
            traceback.print_exception(error, file=file)
        where = f"the traceback is in {file.name}"
    first = (str(error).strip() or "no message").splitlines()[0]
    return (
        f"a fault of this program ({type(error).__name__}: {first}); {where}. What is finished is kept; the same "
        "command again continues. Please report it with that file"
    )
