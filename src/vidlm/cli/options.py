"""What each command can be told, as a dataclass; and a dataclass as a command for typer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields
from inspect import Parameter, Signature, get_annotations
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from vidlm.cli.outcome import outcome

MODEL = "llava-hf/llava-interleave-qwen-0.5b-hf"
FRAMES = 8  # of each video, unless told; the families' own default

FrameCount = Annotated[
    int | None,
    typer.Option(
        "--frames", min=1, metavar="N", help="Frames of each video, evenly spread; else 8."
    ),
]
Rate = Annotated[
    float | None,
    typer.Option("--fps", metavar="RATE", help="Frames a second, not --frames."),
]
Start = Annotated[
    str | None, typer.Option("--start", metavar="TIME", help='From here on: seconds or "mm:ss".')
]
End = Annotated[str | None, typer.Option("--end", metavar="TIME", help="Up to here.")]
Sampling = Annotated[
    str | None,
    typer.Option(
        "--sampling",
        metavar="RULE",
        help="uniform, keyframes, scenes, or a model's own: linspace, slowfast, videollama3.",
    ),
]
Times = Annotated[
    str | None, typer.Option("--times", metavar="T,T", help="The frames shown at these times.")
]
Indices = Annotated[
    str | None, typer.Option("--indices", metavar="I,I", help="Frames by number, from 0.")
]
AllowPrivate = Annotated[
    bool,
    typer.Option("--allow-private", help="Fetch URLs of private networks and this machine, too."),
]
Timeout = Annotated[
    float | None,
    typer.Option("--timeout", metavar="SECONDS", help="Longest download of a video; else 30."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", metavar="NAME", help="float32, bfloat16, float16; else as stored."),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        metavar="KIND",
        help="int8, int4, nf4: weights in fewer bits.",
    ),
]
KvDtype = Annotated[
    str | None,
    typer.Option(
        "--kv-dtype", metavar="NAME", help="int8: keys and values in half the room; else auto."
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback where something fails.")]
Videos = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="VIDEO",
        help="A path, a URL, a video saved by index, a folder or quoted pattern of images, or - "
        "for stdin; one or more.",
    ),
]
ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        envvar="VIDLM_MODEL",
        metavar="NAME",
        help="A folder, a hub repository, or demo: the small model that comes with vidlm.",
    ),
]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="As for ask.")]
DeviceName = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="NAME", help="cpu (default), cuda, cuda:1, mps, auto, balanced."
    ),
]
MaxMemory = Annotated[
    list[str] | None,
    typer.Option(
        "--max-memory",
        metavar="D=SIZE,...",
        help="With --device auto or balanced, for weights: 0=20GiB,cpu=60GiB.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that exists.")]


# ---- what several commands are told ----------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Common:
    """Every command."""

    debug: Debug = False


@dataclass(frozen=True, kw_only=True)
class Working(Common):
    """One that tells how far it is."""

    quiet: Quiet = False


@dataclass(frozen=True, kw_only=True)
class Loads(Common):
    """One that loads a model, or looks at how it would be."""

    dtype: Dtype = None
    quantize: Quantize = None
    kv_dtype: KvDtype = None
    device: DeviceName = None
    max_memory: MaxMemory = None


@dataclass(frozen=True, kw_only=True)
class Reads(Common):
    """One that reads videos."""

    allow_private: AllowPrivate = False
    timeout: Timeout = None


@dataclass(frozen=True, kw_only=True)
class Chooses(Reads):
    """One that takes frames of videos."""

    frames: FrameCount = None
    fps: Rate = None
    start: Start = None
    end: End = None
    sampling: Sampling = None
    times: Times = None
    indices: Indices = None


# ---- the commands ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Ask(Chooses, Loads, Working):
    """Ask a question about videos or images.

    The answer goes to stdout as it comes, progress to stderr.

    \b
      vidlm ask vidlm-demo/scene.mp4 "What happens?" --model demo
      vidlm ask vidlm-demo/scene.mp4 "What moves?" --model demo --end 1 --json
      cat vidlm-demo/scene.mp4 | vidlm ask - "What happens?" --model demo
    """

    videos: Videos = None
    question: Annotated[
        str | None, typer.Argument(metavar="QUESTION", help="In quotes, behind the videos.")
    ] = None
    model: ModelName = MODEL
    fit: Annotated[
        bool,
        typer.Option(
            "--fit", help="As many frames as fit, found before loading; --frames N: all or none."
        ),
    ] = False
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", min=1, metavar="N", help="Longest answer, in tokens."),
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", min=0, metavar="T", help="Above 0 samples; else greedy."),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", min=0, max=1, metavar="P", help="Sample from the likeliest P."),
    ] = None
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, metavar="S", help="Makes sampling repeatable.")
    ] = None
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="A system prompt.")
    ] = None
    json: Json = False
    no_stream: Annotated[
        bool, typer.Option("--no-stream", help="Print the answer when it is complete.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class Index(Chooses, Loads, Working):
    """Save what a model makes of videos, to ask about them later without paying again.

    A saved video stands wherever ask takes a VIDEO, with the same model. It holds no pixels.
    """

    videos: Annotated[
        list[str],
        typer.Argument(
            metavar="VIDEO",
            help="A path, a URL, a folder or quoted pattern of images, or - for stdin.",
        ),
    ]
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Else <video>.safetensors, here; for several videos a folder.",
        ),
    ] = None
    model: ModelName = MODEL
    no_kv: Annotated[
        bool, typer.Option("--no-kv", help="Features alone: smaller, and a slower first answer.")
    ] = False
    system: Annotated[
        str | None,
        typer.Option("--system", metavar="TEXT", help="The system prompt of later questions."),
    ] = None
    force: Force = False


@dataclass(frozen=True, kw_only=True)
class Demo(Common):
    """See a small model answer about drawn videos.

    The model comes with vidlm and knows moving shapes only; the videos are drawn on the spot and
    kept, each with a contact sheet.
    """

    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where videos and contact sheets go.")
    ] = Path("vidlm-demo")
    seed: Annotated[
        int, typer.Option("--seed", min=0, metavar="S", help="Another seed, other videos.")
    ] = 0


@dataclass(frozen=True, kw_only=True)
class Info(Loads, Reads):
    """What a model needs, before it is loaded.

    Tokens, whether they fit, and memory, from config.json and the headers of the weight files. A
    model that is neither a folder nor in the hub's cache is downloaded first.
    """

    model: ModelArgument
    video: Annotated[
        str | None, typer.Option("--video", metavar="VIDEO", help="Plan for this video.")
    ] = None
    frames: FrameCount = None
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class Frames(Chooses):
    """Save the frames that are taken of videos.

    They go into one picture a video, a contact sheet, each with its number and time. With --model
    they are those that this model sees: chosen by its rule, cropped and resized as it gets them.
    """

    videos: Annotated[
        list[str],
        typer.Argument(
            metavar="VIDEO",
            help="A path, a URL, a folder or quoted pattern of images, or - for stdin.",
        ),
    ]
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PNG",
            help="Else <video>_frames.png, here; for several videos a folder.",
        ),
    ] = None
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="NAME", help="Show what this model sees; as for ask."),
    ] = None
    force: Force = False


def command(options: type[Any], run: Callable[[Any], None]) -> Callable[..., None]:
    """A function as typer wants it: its parameters are the dataclass's fields, its end a code."""

    def call(**values: Any) -> None:
        raise typer.Exit(outcome(run, options(**values)))

    hints = get_type_hints(options, include_extras=True)
    call.__doc__ = options.__doc__
    call.__annotations__ = hints
    call.__signature__ = Signature(  # type: ignore[attr-defined]
        [
            Parameter(
                field.name,
                Parameter.KEYWORD_ONLY,
                default=Parameter.empty if field.default is MISSING else field.default,
                annotation=hints[field.name],
            )
            for field in _in_order(options)
        ]
    )
    return call


def _in_order(options: type[Any]) -> list[Field[Any]]:
    """A command's own options, then those that it shares, as its bases are named: what --help
    shows. A dataclass has them the other way round."""
    known = {field.name: field for field in fields(options)}
    named = dict.fromkeys(name for each in options.__mro__ for name in get_annotations(each))
    return [known[name] for name in named]
