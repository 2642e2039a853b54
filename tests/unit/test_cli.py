"""The command line as its users meet it: as a process, with files, pipes and signals."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vidlm.cli.ask import trimmed
from vidlm.cli.outcome import outcome
from vidlm.cli.progress import Progress
from vidlm.cli.sources import check_sources
from vidlm.demo import recipe, show
from vidlm.demo.questions import corpus
from vidlm.demo.world import draw_clip, write_mp4
from vidlm.errors import InvalidArgument, MediaError, MediaNotFound
from vidlm.models.llava import LlavaConfig, LlavaNetwork
from vidlm.weights import save

ROOT = Path(__file__).resolve().parents[2]
ENDLESS = 10**6  # tokens: minutes, were nobody to stop it


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the demo's files and a tiny network that answers AAAA, whatever is asked.

    Its layers add nothing to the embeddings, which are all ones, and its head favours one token.
    """
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = recipe.train_tokenizer(corpus(np.random.default_rng(0), 8))
    recipe.write_files(folder, tokenizer)
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    text = {**vision, "vocab_size": recipe.VOCAB, "max_position_embeddings": 2 * ENDLESS}
    config = LlavaConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "num_attention_heads": 1,
            "image_size": recipe.SIZE,
            "patch_size": 32,
            **vision,
        },
        text_config={
            "model_type": "qwen2",
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            **text,
        },
        image_token_index=recipe.SPECIALS.index("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    network = LlavaNetwork(config).requires_grad_(False)
    for name, parameter in network.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
            parameter.zero_()
    network.model.language_model.embed_tokens.weight.fill_(1)
    network.lm_head.weight[tokenizer.token_to_id("A")] = 1
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    defaults = {"eos_token_id": recipe.VOCAB, "max_new_tokens": 4}  # a token that never comes
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    save(network, folder)
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a clip in it."""
    write_mp4(draw_clip(np.random.default_rng(0)), tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VIDLM_")}
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def vidlm(*words: str | Path, stdin: bytes = b"", **more: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "vidlm.cli", *map(str, words)],
        input=stdin,
        env=environment(**more),
        capture_output=True,
        check=False,
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def failure(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line that a failed command ends with."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("vidlm: ")
    return last


# ---- ask -------------------------------------------------------------------------------------


def test_the_answer_is_all_of_stdout_and_stages_are_on_stderr(place: Path, model: Path) -> None:
    done = vidlm("ask", "clip.mp4", "What happens?", "--frames", "3", VIDLM_MODEL=str(model))
    assert (done.returncode, done.stdout) == (0, "AAAA\n")
    *lines, _ = done.stderr.splitlines()  # a note that the answer is cut off
    assert [line.split()[2] for line in lines] == [
        *("load", "read", "prepare", "encode", "prefill", "answer")
    ]
    assert "3 frames, 00:00.00 to 00:01.33" in lines[1]
    assert "4 tokens" in lines[-1]
    assert "\033" not in done.stderr


def test_json_is_one_object_and_nothing_else(place: Path, model: Path) -> None:
    Image.new("RGB", (40, 30)).save("still.png")
    options = ("--model", model, "--frames", "2", "--max-tokens", "5", "--json", "--quiet")
    clip = (place / "clip.mp4").read_bytes()
    done = vidlm("ask", "-", "still.png", "What?", *options, stdin=clip)
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told["model"] == str(model)
    assert (told["question"], told["sources"]) == ("What?", ["-", "still.png"])
    assert (told["text"], told["finish_reason"]) == ("AAAAA", "length")
    assert [(f["media"], f["index"], f["pts"]) for f in told["frames"]] == [(0, 0, 0), (0, 12, 1)]
    assert told["usage"]["completion_tokens"] == 5
    assert told["usage"]["media_tokens"] == 3 * 4
    assert set(told["timings"]) == {"decode_media", "preprocess", "encode", "prefill", "decode"}
    assert told["warnings"] == []


@pytest.fixture
def endless(place: Path, model: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has begun an answer without end."""
    words = ["ask", "clip.mp4", "What?", "--model", str(model), "--max-tokens", str(ENDLESS)]
    process = subprocess.Popen(
        [sys.executable, "-m", "vidlm.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"A"
        yield process
        process.kill()


def test_ctrl_c_ends_with_one_line(endless: subprocess.Popen[bytes]) -> None:
    endless.send_signal(signal.SIGINT)
    out, err = endless.communicate(timeout=300)
    assert endless.returncode == 130
    assert out.strip(b"A") == b"\n"  # the line of the answer is ended
    assert err.splitlines()[-1] == b"vidlm: interrupted"
    assert b"Traceback" not in err


def test_a_reader_that_goes_away_is_no_event(endless: subprocess.Popen[bytes]) -> None:
    assert endless.stdout is not None
    assert endless.stderr is not None
    endless.stdout.close()
    err = endless.stderr.read()
    assert endless.wait(timeout=300) == 1
    assert err.splitlines()[-1].split()[2] == b"prefill"  # the last stage, and no word after it


def test_a_missing_file_is_told_before_a_model_is_sought(place: Path) -> None:
    line = failure(vidlm("ask", "clop.mp4", "What?", "--model", "no/such/model"), 1)
    assert "clop.mp4: there is no such file" in line


def test_debug_adds_the_traceback(place: Path) -> None:
    done = vidlm("ask", "clop.mp4", "What?", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "MediaNotFound" in done.stderr


def test_text_in_a_files_clothing(place: Path, model: Path) -> None:
    (place / "text.mp4").write_text("not a video")
    line = failure(vidlm("ask", "text.mp4", "What?", "--model", model), 1)
    assert "text.mp4: text, not a video" in line


def test_a_missing_model(place: Path) -> None:
    line = failure(vidlm("ask", "clip.mp4", "What?", "--model", "./models/none"), 1)
    assert "no such folder" in line
    assert "--model demo" in line


def test_the_hub_out_of_reach(place: Path) -> None:
    """Without --model, which is also the test of what is asked for then."""
    hub = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "cache")}
    line = failure(vidlm("ask", "clip.mp4", "What?", **hub), 1)
    assert "'llava-hf/llava-interleave-qwen-0.5b-hf'" in line
    assert "--model demo" in line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["clip.mp4"], "only 'clip.mp4' was given"),
        (["clip.mp4", "What?", "--frames", "8", "--fps", "2"], "--frames 8 and --fps 2 exclude"),
        (["clip.mp4", "What?", "--start", "soon"], "--start 'soon' is not a time"),
    ],
)
def test_wrong_usage(place: Path, words: list[str], says: str) -> None:
    assert says in failure(vidlm("ask", *words), 2)


def test_an_unknown_option(place: Path) -> None:
    done = vidlm("ask", "clip.mp4", "What?", "--framez", "8")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--framez" in done.stderr
    assert "--frames" in done.stderr


# ---- the other commands ----------------------------------------------------------------------


def test_frames_writes_a_sheet_and_replaces_nothing_unasked(place: Path) -> None:
    done = vidlm("frames", "clip.mp4", "--frames", "4")
    assert (done.returncode, done.stdout) == (0, "clip_frames.png\n")
    assert [line.split() for line in done.stderr.splitlines()] == [
        ["frame", "time"],
        ["0", "00:00.00"],
        ["6", "00:00.50"],
        ["12", "00:01.00"],
        ["18", "00:01.50"],
    ]
    before = (place / "clip_frames.png").read_bytes()
    with Image.open(io.BytesIO(before)) as sheet:
        assert sheet.format == "PNG"
        assert min(sheet.size) > 2 * 192
    assert "--force" in failure(vidlm("frames", "clip.mp4"), 2)
    assert (place / "clip_frames.png").read_bytes() == before
    assert vidlm("frames", "clip.mp4", "--force").returncode == 0
    assert (place / "clip_frames.png").read_bytes() != before  # eight frames instead of four


def test_info_as_json(place: Path, model: Path) -> None:
    done = vidlm("info", model, "--video", "clip.mp4", "--frames", "99", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["video"] == {"name": "clip.mp4", "seconds": 2.0, "frames": 24}
    assert (told["family"], told["frames"], told["tokens_per_frame"]) == ("llava", 24, 4)
    assert told["fits"] is True


def test_help_loads_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "vidlm.cli", "--help"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("ask", "demo", "info", "frames"))
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in loaded
    assert not loaded & {"torch", "numpy", "av", "PIL", "rich", "huggingface_hub", "tokenizers"}


def test_version() -> None:
    done = vidlm("--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "vidlm")


def test_demo_writes_its_videos_and_judges_the_answers(
    place: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(show, "DEMO", model)
    show.show(Path("shown"), 0, lambda text, nl=True: print(text, end="\n" if nl else ""))
    told = capsys.readouterr().out
    names = {path.name for path in (place / "shown").iterdir()}
    assert names == {f"{n}.{end}" for n in ("scene", "first", "second") for end in ("mp4", "png")}
    assert told.count("[WRONG]") == told.count("AAAA") == told.count("truth") >= 7
    assert "0 of" in told
    assert told.rstrip().endswith("--model llava-hf/llava-interleave-qwen-0.5b-hf")
    assert max(map(len, told.splitlines())) <= 80


# ---- parts -----------------------------------------------------------------------------------

PIECES = st.lists(st.text("a b\n", max_size=5))


@given(PIECES)
def test_trimmed_pieces_make_the_stripped_text(pieces: list[str]) -> None:
    assert "".join(trimmed(pieces)) == "".join(pieces).strip()


def test_trimmed_pieces_come_at_once() -> None:
    pieces = iter(["  a", "b ", "c"])
    stream = trimmed(pieces)
    assert [next(stream), next(stream)] == ["a", "b"]
    assert list(pieces) == ["c"]


@given(PIECES, st.integers(0, 6), st.integers(10, 20))
def test_wrapped_words_fit(pieces: list[str], indent: int, width: int) -> None:
    lines = "".join(show.wrapped(pieces, indent, width)).split("\n")
    assert " ".join(lines).split() == "".join(pieces).split()
    for line in [" " * indent + lines[0], *lines[1:]]:
        assert line[:indent].strip() == ""
        assert len(line) <= width or len(line.split()) == 1


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (InvalidArgument("device_map='x'; allowed: 'cpu'"), 2, "vidlm: --device 'x'; allowed"),
        (InvalidArgument("question=''; ask"), 2, "vidlm: question=''; ask"),
        (InvalidArgument("a: EngineOptions(kv_dtype='int8')"), 2, "vidlm: a: --kv-dtype int8\n"),
        (InvalidArgument("a: EngineOptions(kv_dtype=None), b"), 2, "vidlm: a: --kv-dtype auto, b"),
        (InvalidArgument("EngineOptions(exact=True)"), 2, "vidlm: EngineOptions(exact=True)"),
        (MediaError("two\nlines"), 1, "vidlm: two lines"),
        (PermissionError(13, "Permission denied", "x.png"), 1, "vidlm: x.png: Permission denied"),
        (KeyError("k"), 1, "vidlm: unexpected KeyError: 'k'; run it again with --debug"),
    ],
)
def test_every_failure_is_a_line_and_a_code(
    error: Exception, code: int, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(options: object) -> None:
        raise error

    assert outcome(fail, SimpleNamespace(debug=False)) == code
    told = capfd.readouterr().err
    assert told.startswith(says)
    assert told.count("\n") == 1


def test_words_of_an_unquoted_question_are_recognised(place: Path) -> None:
    with pytest.raises(InvalidArgument, match="question in quotes"):
        check_sources(["clip.mp4", "What"])
    with pytest.raises(MediaNotFound):
        check_sources(["clip.mp4", "clop.mp4"])
    with pytest.raises(InvalidArgument, match="give it once"):
        check_sources(["-", "-"])
    check_sources(["clip.mp4", "https://example.invalid/a.mp4"])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_no_color_is_honoured(
    monkeypatch: pytest.MonkeyPatch, no_color: str, coloured: bool
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    progress = Progress(quiet=False)
    progress.now("reading")
    progress.done(0.5, "read", "8 frames")
    told = screen.getvalue()
    assert "reading ..." in told
    assert "    0.50 s  read     8 frames" in told
    assert ("\033[2m" in told) == coloured


def break_off(progress: Progress) -> None:
    """One stage done, the next under way, and then an error."""
    with suppress(MediaError), progress:
        progress.done(0.5, "read", "8 frames")
        progress.now("looking")
        raise MediaError("broken")


def test_what_went_on_is_cleared_before_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    break_off(Progress(quiet=False))
    assert screen.getvalue().endswith("\r\033[K")


def test_quiet_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    break_off(Progress(quiet=True))
    assert screen.getvalue() == ""
