"""Wrong calls of every command: one line on stderr that names the cause, before a model is sought.

Where a MODEL is given it does not exist, so that an error about the video, the options or the
output can only come from before it was looked for.
"""

from __future__ import annotations

import os
import re
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import clips
from vidlm import load
from vidlm.cli import application
from vidlm.demo.world import draw_clip, write_mp4

M = ["--model", "./no-model"]
LONG = "word " * 6000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A current folder with one of everything."""
    place = tmp_path_factory.mktemp("wrong")
    write_mp4(draw_clip(np.random.default_rng(0)), place / "clip.mp4")  # 2 s, 24 frames
    (place / "empty.mp4").touch()
    (place / "text.mp4").write_text("not a video")
    (place / "cut.mp4").write_bytes((place / "clip.mp4").read_bytes()[:2000])
    (place / "song.mp4").write_bytes(clips.sound())
    with wave.open(str(place / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(8000))
    Image.new("RGB", (8, 8)).save(place / "still.png")
    for name in ("none", "imgs"):
        (place / name).mkdir()
    for i in range(3):
        Image.new("RGB", (64, 64)).save(place / "imgs" / f"f{i}.png")
    load("demo").video(place / "clip.mp4", frames=3).save(place / "saved.safetensors", kv=False)
    (place / "damaged.safetensors").write_bytes(b"\0" * 100)
    return place


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")


def call(words: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        application()(words)
    told = capfd.readouterr()
    return int(ended.value.code or 0), told.out, told.err


ASK: list[tuple[list[str], int, str]] = [
    ([], 2, "a video and a question are needed, and neither was given"),
    (["clip.mp4"], 2, "only 'clip.mp4' was given"),
    (["clip.mp4", " "], 2, "the question is empty"),
    (["clip.mp4", "\udcff"], 2, "the question is not UTF-8"),
    (["clip.mp4", "x", "--system", "\udcff"], 2, "--system is not UTF-8"),
    (["", "x"], 2, "a video is empty"),
    (["What?", "clip.mp4"], 2, "the last argument is the question, and 'clip.mp4' is a file"),
    (["clip.mp4", "What", "happens"], 2, "put the whole question in quotes"),
    (["gone.mp4", "x"], 1, "gone.mp4: there is no such file"),
    (["empty.mp4", "x"], 1, "empty.mp4: empty, 0 bytes"),
    (["text.mp4", "x"], 1, "text.mp4: text, not a video"),
    (["cut.mp4", "x"], 1, "cut.mp4: an MP4 without its index (moov)"),
    (["sound.wav", "x"], 1, "sound.wav: sound alone"),
    (["song.mp4", "x"], 1, "song.mp4: no video stream, only audio"),
    (["still.png", "x", "--fit"], 2, "--fit is for videos"),
    (["none", "x"], 1, "none is a folder without images"),
    (["imgs/*.jpg", "x"], 1, "imgs/*.jpg matches no file"),
    (["imgs/*.png", "x", "--indices", "9"], 2, "--indices 9: the clip has 3 frames"),
    (["imgs", "x", "--start", "9"], 2, "--start 9 is beyond the end"),
    (
        ["/dev/null", "x"],
        1,
        "/dev/null is no regular file and no pipe; pipe its contents in, and give -",
    ),
    (["a" * 5000, "x"], 1, "cannot be opened"),
    (["a\nb\033c.mp4", "x"], 1, "a b\ufffdc.mp4: there is no such file"),
    (["ftp://x/y.mp4", "x"], 2, "ftp:// is not fetched"),
    (["htp://x/y.mp4", "x"], 2, "htp:// is not fetched"),
    (["http://127.0.0.1/x.mp4", "x"], 1, "use --allow-private where that is meant"),
    (["http://127.0.0.1:1/x.mp4", "x", "--allow-private"], 1, "the transfer failed"),
    (["http://[::1", "x"], 1, "a URL that makes no sense"),
    (["https://", "x"], 1, "a URL without a host"),
    (["data:nonsense", "x"], 1, "a data URL without a comma"),
    (["file:///gone.mp4", "x"], 1, "/gone.mp4: there is no such file"),
    (["clip.mp4", "x", "--timeout", "0"], 2, "--timeout 0.0; give seconds above 0"),
    (["clip.mp4", "x", "--start", "12:30"], 2, "--start 12:30 is beyond the end"),
    (["clip.mp4", "x", "--start", "soon"], 2, "--start 'soon' is not a time"),
    (["clip.mp4", "x", "--start", "2", "--end", "1"], 2, "--start 2 is not before --end 1"),
    (["clip.mp4", "x", "--times", "0:01,9:00"], 2, "--times 9:00 is beyond the end"),
    (["clip.mp4", "x", "--indices", "0,24"], 2, "--indices 24: the clip has 24 frames"),
    (["clip.mp4", "x", "--indices", "9" * 30], 2, f"--indices {'9' * 30}: the clip has 24"),
    (["clip.mp4", "x", "--indices", "-1"], 2, "--indices -1; give frame numbers"),
    (["clip.mp4", "x", "--indices", "a"], 2, "--indices 'a' are not numbers of frames"),
    (["clip.mp4", "x", "--fps", "nan"], 2, "--fps nan is not a finite number"),
    (["clip.mp4", "x", "--sampling", "best"], 2, "--sampling 'best'; allowed: uniform"),
    (["clip.mp4", "x", "--sampling", "scenes", "--fps", "1"], 2, "nothing to --sampling scenes"),
    (["clip.mp4", "x", "--max-memory", "0=1GB"], 2, "--max-memory without --device"),
    (["saved.safetensors", "x", "--frames", "4"], 2, "with --frames 3, asked for now are --fra"),
    (["saved.safetensors", "x", "--indices", "1,2"], 2, "asked for now are --indices 1,2"),
    (["gone.safetensors", "x"], 1, "gone.safetensors: there is no such file"),
    (["damaged.safetensors", "x"], 2, "damaged.safetensors is damaged"),
]
OTHERS: list[tuple[list[str], int, str]] = [
    (["index", "text.mp4", *M], 1, "text.mp4: text, not a video"),
    (["index", "clip.mp4", "--start", "9:00", *M], 2, "--start 9:00 is beyond the end"),
    (["index", "saved.safetensors", *M], 2, "is a saved video already"),
    (["index", "clip.mp4", "clip.mp4", *M], 2, "would be saved as one file"),
    (["index", "clip.mp4", "-o", "x.mp4", *M], 2, "name it x.safetensors"),
    (
        ["index", "clip.mp4", "-o", "text.mp4/x.safetensors", *M],
        1,
        "text.mp4 could not be made (a file",
    ),
    (["index", "-", *M], 2, "give one with --output"),
    (["info", "./no-model", "--video", "text.mp4"], 1, "text.mp4: text, not a video"),
    (["info", "./no-model", "--video", "still.png"], 2, "--video still.png: give a video"),
    (["info", "./no-model", "--video", ""], 2, "a video is empty"),
    (["info", "imgs"], 1, "imgs has no config.json"),
    (["frames", "text.mp4", *M], 1, "text.mp4: text, not a video"),
    (["frames", "clip.mp4", "--times", "9:00", *M], 2, "--times 9:00 is beyond the end"),
    (["frames", "saved.safetensors", *M], 2, "holds no pixels"),
    (["frames", "still.png", *M], 2, "still.png is an image"),
    (["frames", "clip.mp4", "-o", "x.jpg"], 2, "name it x.png"),
    (["frames", "clip.mp4", "imgs", "-o", "-"], 2, "give one video"),
    (["frames", "clip.mp4", "clip.mp4"], 2, "two of the sheets would be one file"),
    (["frames", "clip.mp4", "-o", "text.mp4/x.png"], 1, "text.mp4 could not be made (a file"),
    (["frames", "clip.mp4", *M], 1, "model './no-model': no such folder"),
    (["demo", "--out", "text.mp4"], 1, "text.mp4 could not be made (a file of that name"),
    (["demo", "--out", "text.mp4/x"], 1, "text.mp4/x could not be made (a file"),
    (["bench", "latency", "./no-model", "text.mp4"], 1, "text.mp4: text, not a video"),
    (["bench", "throughput", "./no-model", "text.mp4"], 1, "text.mp4: text, not a video"),
    (["bench", "decode", "text.mp4"], 1, "text.mp4: text, not a video"),
    (["bench", "decode", "-"], 2, "name a file"),
    (["help", "nope"], 2, "no command 'nope'"),
    (["help", "ask", "nope"], 2, "no command 'nope'"),
]
CALLS = [(["ask", *words, *M], code, says) for words, code, says in ASK] + OTHERS


@pytest.mark.parametrize(("words", "code", "says"), CALLS, ids=lambda value: str(value)[:60])
def test_one_line_names_the_cause(
    words: list[str], code: int, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sorted(Path().iterdir())
    ended, out, err = call(words, capfd)
    assert (ended, out) == (code, "")
    (line,) = (line for line in err.splitlines() if line.startswith("vidlm: "))
    assert says in line
    assert line == err.splitlines()[-1]
    for word in ("unexpected", "Traceback", "--debug", "num_frames", "FetchPolicy", "Limits."):
        assert word not in line.replace("unexpected keyword", "")
    assert not re.search("[\0-\x09\x0b-\x1f]", err)
    assert sorted(Path().iterdir()) == before  # nothing is left behind


@pytest.mark.parametrize(
    "words",
    [
        ["ask", "clip.mp4", "x", "--frames", "0"],
        ["ask", "clip.mp4", "x", "--frames", "four"],
        ["ask", "clip.mp4", "x", "--top-p", "nan"],
        ["ask", "clip.mp4", "x", "--temperature", "-1"],
        ["ask", "--frmes", "3", "clip.mp4", "x"],
        ["frames"],
        ["bench", "nope"],
        ["nope"],
        ["--nope"],
        ["version", "extra"],
    ],
)
def test_wrong_words_show_the_usage(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(words, capfd)
    assert (code, out) == (2, "")
    assert "Usage: " in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "what"),
    [(["clip.mp4", LONG], "question"), (["clip.mp4", "x", "--system", LONG], "system prompt")],
)
def test_a_text_that_is_too_long(
    words: list[str], what: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(["ask", *words, "--model", "demo"], capfd)
    assert code == 2
    assert f"shorten the {what}, which has" in err.splitlines()[-1]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a device that is full")
def test_a_full_disk_is_an_ordinary_error(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, data: bytes) -> int:
        with open("/dev/full", "wb", buffering=0) as full:
            return full.write(data)

    monkeypatch.setattr(Path, "write_bytes", write)
    code, out, err = call(["frames", "clip.mp4", "-o", "full.png"], capfd)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == (
        "vidlm: full.png could not be written (No space left on device); free some space, or write "
        "to another disk"
    )
    assert not list(folder.glob("*full.png*"))
