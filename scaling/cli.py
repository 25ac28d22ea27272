"""The command line `recscale`, which finds its commands by name and imports one only when it runs.

A command is a click command that some distribution declares as an entry point of the group `recscale.commands`.
`recscale --help` lists them all without importing any.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import sys
import traceback
from collections.abc import Sequence

import click

from recscale.pallas_kernels.names import nearest

GROUP = "recscale.commands"

# One line per command, kept here so that `--help` need not import the modules; a test compares the names with the
# entry points.
HELP = {
    "sweep": "Plan, launch, collect, fit and plot a sweep file; resumes what stopped.",
    "paper": "Run the orderings a paper published, and judge each of them.",
    "plan": "Show every run of a sweep file with predicted size, memory and time.",
    "launch": "Run a plan; done runs are skipped, stopped ones resume.",
    "status": "Show how far the runs of a folder are.",
    "cancel": "Take the jobs of a folder from a scheduler's queue.",
    "run-job": "Train one job of a plan, for a scheduler that runs commands.",
    "collect": "Gather the runs of a folder into one table.",
    "fit": "Fit a scaling law to a run table.",
    "compare": "Does one architecture scale better than another?",
    "design": "Which runs to train next, for intervals that are narrow enough.",
    "forecast": "Predict larger runs from smaller ones, and say how often such intervals hold.",
    "pool": "Exponents of several architectures from one hierarchical fit.",
    "optimum": "Split a budget of compute between size and data.",
    "isoflop": "The compute-optimal size by three approaches side by side.",
    "specification": "How much a fitted number depends on defensible choices.",
    "decisions": "How often small runs order settings as large ones do.",
    "published": "Laws that papers print, and whether a fitted exponent lies inside theirs.",
    "plot": "Draw a fitted law and its runs.",
    "report": "One page of studies, to be explored in a browser.",
    "train": "Train one run.",
    "evaluate": "Measure a trained model on a part of a log.",
    "predict": "Score the rows of a file with a trained model.",
    "export": "Write a trained model as programs that need jax and numpy only.",
    "models": "List the architectures.",
    "count": "Count parameters and FLOPs of an architecture.",
    "size": "Find the shape of an architecture for a target size or cost.",
    "data": "Import a log of your own, or get a public one.",
    "bench": "Measure speed on this machine.",
    "aot": "Compile kernels and training steps for chips that are not here.",
}


class CommandGroup(click.Group):
    """Commands from the entry points; an unknown name is answered with the nearest one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        known = _entry_points()
        ours = [name for name in HELP if name in known]
        return ours + sorted(set(known) - set(ours))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = _entry_points().get(cmd_name)
        return None if entry is None else entry.load()

    def resolve_command(self, ctx: click.Context, args: list[str]):
        name = args[0]
        if name not in _entry_points() and not name.startswith("-"):
            raise click.UsageError(f"there is no command {name!r}{nearest(name, self.list_commands(ctx))}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        entries = _entry_points()
        rows = [(name, HELP.get(name) or f"From {entries[name].value}.") for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"recscale {importlib.metadata.version('recscale')}")
        ctx.exit()


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print the version."
)
@click.option("--traceback", is_flag=True, expose_value=False, help="On an error, show where it was raised.")
def cli() -> None:
    """Scaling laws of ranking models: sweep, fit with honest intervals, plot, reuse.

    `recscale COMMAND --help` explains a command.

    Exit codes: 0 done, or something was fitted and printed; 1 wrong input, or runs that failed; 2 wrong usage; 3 every
    number was refused.
    """


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line and exits.

    Errors the project raises on purpose are shown as one line; `--traceback`, anywhere among the arguments, shows the
    whole trace instead. Errors from elsewhere always come with theirs.
    """
    args = list(sys.argv[1:] if args is None else args)
    full = "--traceback" in args
    args = [arg for arg in args if arg != "--traceback"]
    # Commands draw into files. A notebook's kernel leaves a backend here that this Python may not have, and then
    # matplotlib cannot be imported.
    os.environ["MPLBACKEND"] = "agg"
    try:
        code = cli.main(args, prog_name="recscale", standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        _stop("stopped", 130)
    except click.ClickException as error:
        if full:
            traceback.print_exc()
        error.show()
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        if full or not _comes_with_the_lab(error.name or ""):
            raise
        _stop(f"Error: this needs {error.name}, which comes with the laboratory: pip install 'recscale[lab]'", 1)
    except Exception as error:
        if full or not _on_purpose(error):
            raise
        _stop(f"Error: {_message(error)}", 1)
    sys.exit(code if isinstance(code, int) else 0)


@functools.cache
def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}


def _comes_with_the_lab(module: str) -> bool:
    """Whether a module that is missing is one of those that `recscale[lab]` installs and the modules do without."""
    required = importlib.metadata.requires("recscale") or []
    top = module.partition(".")[0]
    return any(re.match(rf"{top}\b", line.replace("_", "-")) for line in required if 'extra == "lab"' in line)


def _on_purpose(error: Exception) -> bool:
    """Whether this project raised the error to tell the user something, and did not trip over a fault of its own."""
    if isinstance(error, OSError) and (isinstance(error, FileNotFoundError) or error.filename):
        return True  # a path the user gave, or a file of the machine's: the message names it
    # A lookup in a dictionary also raises KeyError; a message has words.
    told = isinstance(error, ValueError | OSError) or (isinstance(error, KeyError) and " " in str(error.args[:1]))
    *_, (raising, _) = traceback.walk_tb(error.__traceback__)
    return told and raising.f_globals.get("__name__", "").split(".")[0] == "recscale"


def _message(error: Exception) -> str:
    """The text on one line; that of a KeyError without its quotes, that of the system after the file's name."""
    text = str(error.args[0]) if isinstance(error, KeyError) else str(error)
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
    return " ".join(text.split()) or type(error).__name__


def _stop(message: str, code: int) -> None:
    click.echo(message, err=True)
    sys.exit(code)
