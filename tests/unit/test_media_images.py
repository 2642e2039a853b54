"""Still images and transparency: which formats are opened, and what lies before white."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

import clips
from container_files import muxed
from vidlm.errors import MediaError, MediaLimitError
from vidlm.media import Limits, container, load_image, load_video, pillow

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


def written(image: Image.Image, form: str, **how: object) -> bytes:
    target = io.BytesIO()
    image.save(target, form, **how)
    return target.getvalue()


# ---- formats ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.eps", "a.png", "a.jpg"])
def test_postscript_is_not_run(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("it was"))
    path = tmp_path / name
    path.write_bytes(EPS)
    for load in (lambda: load_image(path), lambda: load_image(EPS), lambda: load_video([path])):
        with pytest.raises(MediaError, match=r"not an image that vidlm reads.*give JPEG, PNG"):
            load()


FORMATS = ("BMP", "DIB", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP")


@pytest.mark.parametrize("form", FORMATS)
def test_formats_that_are_opened(form: str, tmp_path: Path) -> None:
    data = written(Image.fromarray(clips.picture(9)), form, **{"lossless": True})
    assert clips.numbers(np.asarray(load_image(data))[None]) == [9]
    (tmp_path / "picture").write_bytes(data)
    assert clips.numbers(load_video([tmp_path / "picture"]).frames) == [9]


@pytest.mark.parametrize("form", ["ICO", "ICNS", "TGA", "PCX", "SGI", "PDF"])
def test_formats_that_are_not_opened(form: str) -> None:
    data = written(Image.new("RGB", (64, 64)), form)
    with pytest.raises(MediaError, match="not an image that vidlm reads"):
        load_image(data)


def test_a_pillow_without_avif_opens_all_else(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    pillow.formats.cache_clear()
    try:
        assert "AVIF" not in pillow.formats()
        load_image(written(Image.new("RGB", (8, 8)), "PNG"))
    finally:
        pillow.formats.cache_clear()


def test_pixels_are_counted_before_they_are_decoded(monkeypatch) -> None:
    bomb = written(Image.new("1", (20_000, 20_000)), "PNG")
    assert len(bomb) < 100_000
    for data, limits in (
        (bomb, Limits()),
        (written(Image.new("L", (90, 90)), "TIFF"), Limits(pixels=1000)),
    ):
        with pytest.raises(MediaLimitError, match=r"above the limit|exceeds limit"):
            load_image(data, limits=limits)


# ---- transparency of images ------------------------------------------------------------------


def transparent(mode: str) -> Image.Image:
    """8 x 8, black on the left and clear on the right."""
    alpha = Image.new("L", (8, 8), 255)
    alpha.paste(0, (4, 0, 8, 8))
    image = Image.new("P" if mode == "PA" else "RGB", (8, 8))
    image.putalpha(alpha)
    return image if mode == "PA" else image.convert(mode)


def palette() -> Image.Image:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0, 200, 0, 0])
    image.paste(1, (4, 0, 8, 8))
    image.info["transparency"] = 1
    return image


@pytest.mark.parametrize(
    "image",
    [transparent("RGBA"), transparent("LA"), transparent("RGBa"), transparent("PA"), palette()],
    ids=["RGBA", "LA", "RGBa", "PA", "P"],
)
def test_images_lie_on_white(image: Image.Image) -> None:
    for got in (np.asarray(load_image(image)), load_video([image]).frames[0]):
        assert got[4].tolist() == [[0] * 3] * 4 + [[255] * 3] * 4


KEYED = Image.new("RGB", (8, 8))  # one colour, red, stands for transparency
KEYED.paste((255, 0, 0), (4, 0, 8, 8))


@pytest.mark.parametrize(
    ("image", "form", "more"),
    [
        (transparent("RGBA"), "PNG", {}),
        (transparent("LA"), "PNG", {}),
        (palette(), "PNG", {"transparency": 1}),
        (palette(), "GIF", {"transparency": 1}),
        (transparent("RGBA"), "WEBP", {"lossless": True}),
        (transparent("RGBA"), "TIFF", {}),
        (KEYED, "PNG", {"transparency": (255, 0, 0)}),
    ],
    ids=["png", "grey", "palette", "gif", "webp", "tiff", "key"],
)
def test_image_files_lie_on_white(image: Image.Image, form: str, more: dict) -> None:
    got = np.asarray(load_image(written(image, form, **more)))[4]
    assert got.tolist() == [[0] * 3] * 4 + [[255] * 3] * 4


# ---- transparency of clips -------------------------------------------------------------------


def cut_out(count: int = 3) -> clips.Frames:
    """(F, H, W, 4): numbered pictures whose lower half is red, and clear."""
    frames = np.concatenate(
        [clips.pictures(count), np.full((count, 96, 128, 1), 255, np.uint8)], axis=-1
    )
    frames[:, 48:] = 255, 0, 0, 0
    return frames


KINDS = [
    ("apng", "apng", "rgba", {}),
    ("mov", "png", "rgba", {}),
    ("mov", "qtrle", "argb", {}),
    ("mov", "prores_ks", "yuva444p10le", {"profile": "4444"}),
    ("matroska", "ffv1", "yuva420p", {}),
    ("matroska", "ffv1", "bgra", {}),
    ("avi", "utvideo", "gbrap", {}),
    ("nut", "rawvideo", "rgba", {}),
    ("webm", "libvpx", "yuva420p", {"auto-alt-ref": "0"}),
    ("webm", "libvpx-vp9", "yuva420p", {"auto-alt-ref": "0"}),
]


@pytest.mark.parametrize(("box", "codec", "pix_fmt", "options"), KINDS)
def test_clips_lie_on_white(box: str, codec: str, pix_fmt: str, options: dict) -> None:
    data = muxed(cut_out(), box, codec, pix_fmt, source="rgba", options=options)
    video = load_video(data)
    clips.check(video, range(3))
    assert video.frames[:, 60:].min() > 250
    assert not video.warnings
    small = load_video(data, max_side=64, indices=[2])
    assert small.frames.shape == (1, 48, 64, 3)
    assert small.frames[:, 30:].min() > 250
    clips.check(load_video(data, indices=[2, 0]), [2, 0])


def test_a_gif_lies_on_white() -> None:
    images = []
    for number in range(3):
        image = Image.fromarray(clips.picture(number)).convert("P")
        image.paste(255, (0, 48, 128, 96))
        images.append(image)
    target = io.BytesIO()
    images[0].save(
        target, "GIF", save_all=True, append_images=images[1:], transparency=255, disposal=2
    )
    video = load_video(target)
    clips.check(video, range(3))
    assert (video.frames[:, 50:] == 255).all()


def test_an_animated_avif_lies_on_white() -> None:
    if "AVIF" not in Image.registered_extensions().values():
        pytest.skip("this Pillow writes no AVIF (11.3 does)")
    images = [Image.fromarray(frame) for frame in cut_out()]
    target = io.BytesIO()
    times = [100, 200, 300]
    images[0].save(target, "AVIF", save_all=True, append_images=images[1:], duration=times)
    video = load_video(target)
    clips.check(video, range(3))
    assert video.frames[:, 60:].min() > 250
    assert (video.pts.tolist(), video.duration) == ([0.0, 0.1, pytest.approx(0.3)], 0.6)


def test_alpha_that_nobody_reads_is_said(monkeypatch, caplog) -> None:
    data = muxed(cut_out(), "webm", "libvpx-vp9", "yuva420p", source="rgba")
    monkeypatch.setattr(container, "_ALPHA_DECODERS", {"vp9": "no such decoder"})
    caplog.set_level(logging.WARNING)
    video = load_video(data)
    clips.check(video, range(3))
    assert video.warnings == ("no decoder here reads its transparency: the colours below it show",)


def test_the_shots_of_a_clip_are_found_before_white() -> None:
    """Frames that differ only where they are clear are one shot."""
    frames = np.repeat(cut_out(1), 30, axis=0)
    frames[15:, 48:, :, :3] = 0, 0, 255
    data = muxed(frames, "mov", "png", "rgba", source="rgba")
    assert len(load_video(data, sampling="scenes")) == 1


def test_a_palette_that_leaves_alpha_at_zero_means_nothing_by_it() -> None:
    from vidlm.media.picture import _on_white

    clear = np.zeros((2, 2, 4), np.uint8)
    assert (_on_white(clear, has_palette=True) == 0).all()
    assert (_on_white(clear, has_palette=False) == 255).all()


def test_decoders_of_alpha_are_here() -> None:
    """PyAV's own wheels bring both; the clips above would only warn without."""
    assert {"libvpx", "libvpx-vp9"} <= av.codecs_available
