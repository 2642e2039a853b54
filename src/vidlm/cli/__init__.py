"""The command line: `vidlm ask clip.mp4 "What happens?"`. Answers on stdout, all else on stderr.

torch, numpy and PyAV are imported when a command runs, so that --help answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from vidlm import __version__
from vidlm.cli.ask import ask
from vidlm.cli.bench import bench_commands
from vidlm.cli.index import index
from vidlm.cli.options import Ask, Demo, Frames, Index, Info, command
from vidlm.cli.outcome import show_warnings
from vidlm.cli.tools import demo, frames, info


def main() -> None:
    """What `vidlm` runs."""
    show_warnings()
    application()(prog_name="vidlm")


def application() -> typer.Typer:
    """The commands, each a dataclass of options and a function that takes it."""
    # rich would cost more time than all the rest of --help.
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["--help", "-h"]},
    )
    app.callback()(_vidlm)
    app.command("ask")(command(Ask, ask))
    app.command("index")(command(Index, index))
    app.command("demo")(command(Demo, demo))
    app.command("info")(command(Info, info))
    app.command("frames")(command(Frames, frames))
    app.add_typer(bench_commands(), name="bench")
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vidlm {__version__}")
        raise typer.Exit


def _vidlm(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Ask videos questions: a video goes in, an answer comes out."""
