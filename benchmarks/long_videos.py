"""Memory against the number of frames, from a file to an answer's first tokens, on a CPU.

Random bfloat16 weights at published widths with fewer layers and a small vocabulary: how memory
grows with frames does not depend on the number of layers, but for keys and values. Slow-Fast with
one ConvNeXt block of forty, in the first stage, whose map is the largest, and four decoder layers
of 28, of which 0 and 2 read slow tokens; VideoLLaMA3-2B with --vision layers of 27 and four of 28.
The clip is 1280 x 720 pixels at one frame a second, drawn on the spot; no frame repeats another.

Each point is a process of its own. `peak_mb` is the most that was resident in a stage, above what
was before the clip was opened: without weights, but with the tower at work. `account_mb` is what
`vidlm info` reckons for it. One JSON line a point, and one for the line through the points of each
stage, with the largest distance from it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from _shapes import NAVIT, QWEN_2B
from torch import nn

from vidlm.engine import Request, generate
from vidlm.fit import need
from vidlm.media import Limits, Video, load_video
from vidlm.models.base import Media, Prompt, VideoModel
from vidlm.models.slowfast import SlowFastConfig, SlowFastNetwork
from vidlm.models.videollama3 import Patches, VideoLlama3Config, VideoLlama3Network
from vidlm.types import SamplingParams
from vidlm.vision.patches import Patchify
from vidlm.vision.preprocess import CLIP_MEAN, CLIP_STD, PillowPreprocess

FRAMES = {"slowfast": (64, 250, 500, 750, 1000), "videollama3": (60, 300, 600, 900, 1200)}
WIDTH, HEIGHT = 1280, 720
DTYPE = torch.bfloat16
TEXT = {"vocab_size": 4096, "num_hidden_layers": 4, "max_position_embeddings": 65536}
ANSWER = 4
QWEN_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}


def slowfast(vision: int) -> tuple[VideoModel, Callable[[Video], Media]]:
    del vision
    config = SlowFastConfig.from_dict(
        {
            **TEXT,
            **QWEN_7B,
            "mm_vision_tower": "convnext-576",
            "fixture_vision": {"depths": [1, 0, 0, 0]},
            "mm_video_pooling_stride": 2,
            "cross_attn_every_n_layers": 2,
            "min_fast_frames": 16,
            "fast_token_temporal_stride": 4,
        }
    )
    pixels = PillowPreprocess(576, (576, 576), CLIP_MEAN, CLIP_STD)

    def media(video: Video) -> Media:
        count = config.video_tokens(len(video))
        return Media(pixels(list(video.frames)), count, "video", len(video))

    return filled(lambda: SlowFastNetwork(config)), media


def videollama3(vision: int) -> tuple[VideoModel, Callable[[Video], Media]]:
    tower = {**NAVIT, "num_hidden_layers": vision}
    config = VideoLlama3Config.from_dict(
        {"text_config": {**QWEN_2B, **TEXT}, "vision_config": tower, "video_token_id": 4000}
    )
    pixels = Patchify.from_dict({"patch_size": 14}, video=True)

    def media(video: Video) -> Media:
        rows, grid = pixels(list(video.frames))
        kept = pixels.kept(rows, grid)
        merge = pixels.merge_size
        return Patches(rows, int(kept.sum()), "video", grid[0], grid, merge, kept)

    return filled(lambda: VideoLlama3Network(config)), media


PATHS = {"slowfast": slowfast, "videollama3": videollama3}


def filled(make: Callable[[], VideoModel]) -> VideoModel:
    """A model with random weights, made in the dtype that they have."""
    with torch.device("meta"):
        model = make()
    model = model.to(DTYPE).to_empty(device="cpu").requires_grad_(False)
    model.tie()
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            nn.init.ones_(weight)
        else:
            weight.normal_(0, 0.02, generator=generator)
    return model.eval()


def draw(path: Path, frames: int) -> None:
    """A clip of noise that wanders: at one frame a second, as long as it has frames."""
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), np.uint8)
    picture = noise.repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(frames):
            shown = av.VideoFrame.from_ndarray(np.roll(picture, 8 * i, 1), format="rgb24")
            container.mux(stream.encode(shown))
        container.mux(stream.encode())


class Watch:
    """Peak resident memory of one stage after the other, in MB above that at the beginning."""

    def __init__(self) -> None:
        self._least = _status("VmRSS")
        self.peaks: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._restart()

    def stage(self, name: str) -> None:
        """The stage that ends here."""
        self.peaks[name] = (_status("VmHWM") - self._least) >> 20
        self.seconds[name] = round(time.perf_counter() - self._began, 1)
        self._restart()

    def _restart(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        self._began = time.perf_counter()


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def probe(path: str, frames: int, vision: int, clip: str) -> dict[str, Any]:
    """The whole way once, in this process."""
    model, prepare = PATHS[path](vision)
    watch = Watch()
    video = load_video(clip, limits=Limits(kept_bytes=16 << 30), num_frames=frames)
    assert len(video) == frames
    watch.stage("decode")
    media = prepare(video)
    del video
    watch.stage("preprocess")
    ids = (*range(100, 120), *[model.config.placeholders["video"]] * media.tokens, *range(130, 150))
    params = SamplingParams(max_new_tokens=ANSWER)
    with torch.inference_mode():
        media = replace(media, encoded=model.encode([media])[0])
        watch.stage("encode")
        generate(model, [Request(Prompt(ids, (media,)), params)])
    watch.stage("answer")
    wanted = need(model.config, DTYPE, frames, 40 + ANSWER, media.tokens)
    return {
        "frames": frames,
        "tokens": media.tokens,
        "peak_mb": {**watch.peaks, "whole": max(watch.peaks.values())},
        "seconds": watch.seconds,
        "account_mb": wanted.bytes >> 20,
    }


def point(path: str, frames: int, vision: int, clip: Path) -> dict[str, Any]:
    call = [sys.executable, __file__, "--probe", path, str(frames), str(clip)]
    call += ["--vision", str(vision)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{path} with {frames} frames: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def straightness(points: list[dict[str, Any]], stage: str) -> dict[str, Any]:
    """How far the peaks of a stage are from the line that is nearest to them."""
    x = np.array([point["frames"] for point in points])
    y = np.array([point["peak_mb"][stage] for point in points], float)
    slope, begin = np.polyfit(x, y, 1)
    away = float(np.abs(y - (begin + slope * x)).max())
    return {
        "mb_per_frame": round(float(slope), 3),
        "mb_without_frames": round(float(begin)),
        "largest_deviation_mb": round(away, 1),
        "of_largest_peak": round(away / float(y.max()), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--paths", nargs="+", default=list(PATHS), choices=list(PATHS))
    parser.add_argument("--frames", nargs="+", type=int, help="instead of those of each path")
    parser.add_argument("--vision", type=int, default=4, help="layers of VideoLLaMA3's encoder")
    parser.add_argument(
        "--probe", nargs=3, metavar=("PATH", "FRAMES", "CLIP"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.probe:
        path, frames, clip = args.probe
        print(json.dumps(probe(path, int(frames), args.vision, clip)))
        return
    for path in args.paths:
        counts = args.frames or FRAMES[path]
        with tempfile.TemporaryDirectory() as folder:
            clip = Path(folder) / "clip.mp4"
            draw(clip, max(counts))
            points = []
            for frames in counts:
                points.append(point(path, frames, args.vision, clip))
                print(
                    json.dumps({"benchmark": "long_videos", "path": path, **points[-1]}), flush=True
                )
        lines = {stage: straightness(points, stage) for stage in points[0]["peak_mb"]}
        print(json.dumps({"benchmark": "long_videos", "path": path, "lines": lines}), flush=True)


if __name__ == "__main__":
    main()
