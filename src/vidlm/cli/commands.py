"""The commands, each a dataclass of options and a function that takes it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vidlm import __version__
from vidlm.cli.ask import ask
from vidlm.cli.bench import bench_commands
from vidlm.cli.index import index
from vidlm.cli.options import Ask, Demo, Frames, Index, Info, command
from vidlm.cli.sheets import frames
from vidlm.cli.tools import demo, info

HELP = """Ask videos questions: a video goes in, an answer comes out.

\b
  vidlm demo                            draw videos, and see a small model answer
  vidlm ask vidlm-demo/scene.mp4 "What happens?" --model demo
  vidlm ask clip.mp4 "What happens?"    a real model; about 2 GB the first time
  vidlm frames clip.mp4                 a picture of the frames that are taken
"""


def build() -> typer.Typer:
    """All commands below `vidlm`."""
    # rich would cost more time than all the rest of --help.
    app = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        help=HELP,
        context_settings={"help_option_names": ["--help", "-h"]},
    )
    app.callback()(_vidlm)
    app.command("ask")(command(Ask, ask))
    app.command("index")(command(Index, index))
    app.command("demo")(command(Demo, demo))
    app.command("info")(command(Info, info))
    app.command("frames")(command(Frames, frames))
    app.add_typer(bench_commands(), name="bench")
    app.command("version", help="Show the version.")(_version)
    app.command("help", help="Show the help of a command.")(_help)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        _version()
        raise typer.Exit


def _version() -> None:
    typer.echo(f"vidlm {__version__}")


def _help(
    context: typer.Context,
    words: Annotated[list[str] | None, typer.Argument(metavar="COMMAND")] = None,
) -> None:
    assert context.parent is not None
    shown = context.parent
    for word in words or ():
        group: Any = shown.command
        found = group.get_command(shown, word) if hasattr(group, "get_command") else None
        if found is None:
            from vidlm.cli.outcome import USAGE, failed

            raise typer.Exit(failed(f"no command {word!r}; vidlm help lists them", USAGE))
        shown = typer.Context(found, info_name=word, parent=shown)
    typer.echo(shown.get_help())


def _vidlm(
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", callback=_show_version, is_eager=True, help="Show the version."
        ),
    ] = False,
) -> None:
    pass
