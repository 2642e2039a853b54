"""Damaged files give a sound Video or an error of vidlm.errors: no other, no hang, no crash.

The cases are the same on every run, but for a byte now and then where x264 decides otherwise. For
more of them, or for others:

    VIDLM_FUZZ_CASES=50000 VIDLM_FUZZ_SEED=7 python -m pytest tests/unit/test_media_fuzz.py

A failure names its seed and case, and where the damaged file was written. One case alone, from
Python with `tests` on its path (SEED and CASE as told, FOLDER beside the damaged file):

    what, data = fuzz_cases.damaged(SEED, CASE, FOLDER)
    load_video(data, limits=fuzz_child.LIMITS, **fuzz_cases.question(SEED, CASE))
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import fuzz_cases
import fuzz_child
import vidlm
from vidlm.media import load_video

CASES = int(os.environ.get("VIDLM_FUZZ_CASES", "3000"))
SEED = int(os.environ.get("VIDLM_FUZZ_SEED", "0"))
SMALL = 1 << 16  # larger files of a corpus take long and show nothing that small ones do not
HANG_SECONDS = 300.0  # for one case, on a machine that is busy; see fuzz_child.CPU_SECONDS too
MOST_FINDINGS = 10


@dataclass(frozen=True)
class Finding:
    case: int
    told: dict[str, str]


class Child:
    """A process that decodes cases from `first` to `last`; ends with the first that ends it."""

    def __init__(self, folder: Path, seed: int, first: int, last: int) -> None:
        home = [str(Path(vidlm.__file__).parents[1]), str(Path(fuzz_child.__file__).parent)]
        path = filter(None, [os.environ.get("PYTHONPATH")])
        self.log = (folder.parent / "stderr").open("w+")
        self.process = subprocess.Popen(
            # Arithmetic that overflows in silence is a defect too.
            [sys.executable, "-W", "error::RuntimeWarning", fuzz_child.__file__, folder]
            + [str(number) for number in (seed, first, last)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([*home, *path])},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def outcomes(self) -> Iterator[Finding]:
        """What it tells of each case, and what it does not live to tell."""
        case: int | None = None
        while line := self._line(begun=case is not None):
            told = json.loads(line)
            if isinstance(told, int):
                case = told
            else:
                assert case is not None
                yield Finding(case, told)
                case = None
        if line is None:
            self.process.kill()
        if case is not None or self.process.wait() != 0:
            end = "hang" if line is None else f"crash, {ending(self.process.wait())}"
            self.log.seek(0)
            said = f"{end}\n{self.log.read()[-4000:]}"
            assert case is not None, f"between two cases: {said}"
            yield Finding(case, {"outcome": end, "broken": said})

    def _line(self, begun: bool) -> str | None:
        """The next one; "" at the end, None where it does not come."""
        try:
            return self.lines.get(timeout=HANG_SECONDS if begun else 300.0)
        except queue.Empty:
            return None

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.log.close()


def ending(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def run(folder: Path, seed: int, cases: int) -> Counter[str]:
    """Decodes them all, and fails with every promise that was broken. Returns the outcomes."""
    outcomes: Counter[str] = Counter()
    findings: list[Finding] = []
    first = 0
    while first < cases and len(findings) < MOST_FINDINGS:
        child = Child(folder, seed, first, cases)
        try:
            for finding in child.outcomes():
                first = finding.case + 1
                outcomes[finding.told["outcome"]] += 1
                if "broken" in finding.told:
                    findings.append(finding)
                if len(findings) >= MOST_FINDINGS:
                    break
        finally:
            child.end()
    if findings:
        pytest.fail("\n\n".join(text(finding, seed, folder) for finding in findings), False)
    assert sum(outcomes.values()) == cases
    return outcomes


def text(finding: Finding, seed: int, folder: Path) -> str:
    done, data = fuzz_cases.damaged(seed, finding.case, folder)
    path = folder.parent / f"damaged-{seed}-{finding.case}"
    path.write_bytes(data)
    how = fuzz_cases.question(seed, finding.case)
    return f"seed {seed}, case {finding.case}: {done}; {how}; {path}\n{finding.told['broken']}"


@pytest.fixture(scope="module")
def sound(tmp_path_factory, clips_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "sound"
    draw(folder)
    for path in clips_dir.iterdir():
        if path.suffix != ".md" and path.stat().st_size < SMALL:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def draw(folder: Path) -> None:
    """The sound files, made in a process of their own."""
    folder.mkdir()
    home = [str(Path(vidlm.__file__).parents[1]), str(Path(fuzz_cases.__file__).parent)]
    subprocess.run(
        [sys.executable, fuzz_cases.__file__, folder],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(home)},
        check=True,
    )


def test_sound_files_are_sound(sound: Path) -> None:
    for path in sound.iterdir():
        video = load_video(path, limits=fuzz_child.LIMITS, num_frames=4)
        fuzz_child.check(video, {"num_frames": 4})
        assert len(video) == min(4, video.total_frames), path.name


def test_damaged_files_are_read_or_refused(sound: Path) -> None:
    outcomes = run(sound, SEED, CASES)
    least = CASES // 20  # the damage is neither too little nor too much
    assert outcomes["MediaError"] > least, outcomes
    assert outcomes["Video"] > least, outcomes
    assert outcomes["Video with warnings"] > least, outcomes


def test_the_larger_corpus_damaged(shared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sound"
    folder.mkdir()
    for path in (shared / "data" / "videos").iterdir():
        if path.suffix not in (".md", ".json") and 0 < path.stat().st_size < SMALL:
            (folder / path.name).write_bytes(path.read_bytes())
    run(folder, SEED, max(CASES // 5, 1))


# ---- the harness itself ----------------------------------------------------------------------

# A `sitecustomize` of the child: its cases 1 to 5 each break a promise of their own.
BAD = """
import dataclasses, glob, itertools, os, sys, time
import vidlm.media
from vidlm.errors import MediaError

cases = itertools.count(int(sys.orig_argv[-2]))
load = vidlm.media.load_video

def load_video(data, **how):
    match next(cases):
        case 1: os.abort()
        case 2: {}["no such key"]
        case 3: time.sleep(99)
        case 4:
            video = load(glob.glob(sys.orig_argv[-4] + "/*-webp")[0])
            return dataclasses.replace(video, pts=video.pts * float("nan"))
        case 5: raise MediaError("without a name")
    raise MediaError("video: no")

vidlm.media.load_video = load_video
"""


def test_what_breaks_a_promise_is_found(sound: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(BAD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys.modules[__name__], "HANG_SECONDS", 3.0)
    with pytest.raises(pytest.fail.Exception) as caught:
        run(sound, 1, 7)
    told = [part for part in str(caught.value).split("seed 1, ") if part]
    expected = ["crash, SIGABRT", "KeyError: 'no such key'", "hang", "times [nan", "without a name"]
    for case, (part, said) in enumerate(zip(told, expected, strict=True), 1):
        assert part.startswith(f"case {case}: ")
        assert said in part
    done, data = fuzz_cases.damaged(1, 4, sound)
    assert done in told[3]
    assert (sound.parent / "damaged-1-4").read_bytes() == data
