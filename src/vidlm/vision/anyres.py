"""AnyRes: an image as tiles of a canvas that fits its shape, and once more as a whole.

How LLaVA-NeXT and LLaVA-NeXT-Video see still images (https://llava-vl.github.io/blog/2024-01-30-llava-next).
The image is resized into the best of a few canvases ("pinpoints"), padded with black, and cut into
square tiles; the whole of it, squashed to one tile, comes first. Behind the vision tower the cells
that only saw padding are cut off again. Sizes are (height, width) of the original image.

Arithmetic, Python's floats from integers, is that of transformers' llava_next, torchvision backend.
Parity: tests/parity/test_anyres.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from vidlm.errors import UnsupportedModel
from vidlm.vision.preprocess import Frame, Preprocess, resize, to_pixels

Size = tuple[int, int]  # height, width

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


@dataclass(frozen=True)
class AnyRes:
    """What preprocessor_config.json says to do with an image.

    tile       what each tile passes, which is of its size already: rescale and normalise
    pinpoints  (height, width) of the canvases to choose from
    """

    tile: Preprocess
    pinpoints: tuple[Size, ...] = PINPOINTS

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> AnyRes:
        """Read preprocessor_config.json; absent keys take transformers' class defaults."""
        always = {"do_resize": True, "do_center_crop": True, "do_pad": None}
        tile = Preprocess.from_dict({**config, **always})
        side = tile.size[0]
        if tile.size != (side, side) or tile.resize not in (side, (side, side)):
            # Then what one of these is told to leave out would show; else it changes nothing.
            for name in ("do_resize", "do_center_crop"):
                if not config.get(name, True):
                    raise UnsupportedModel(
                        f"{name}=false, size={tile.resize} and crop_size={tile.size}; "
                        "with tiles these two must be one square"
                    )
        pinpoints = config.get("image_grid_pinpoints") or PINPOINTS
        return cls(tile, tuple((int(height), int(width)) for height, width in pinpoints))

    def to_dict(self) -> dict[str, Any]:
        """A preprocessor_config.json that vidlm and transformers both read."""
        return {
            **self.tile.to_dict(),
            "image_processor_type": "LlavaNextImageProcessor",
            "do_pad": True,
            "image_grid_pinpoints": [list(size) for size in self.pinpoints],
        }

    @property
    def side(self) -> int:
        """S: height and width of a tile."""
        return self.tile.size[0]

    def tiles(self, size: Size) -> int:
        """N: how many tiles an image of this size becomes, the whole included."""
        return tiles(size, self.pinpoints, self.side)

    def tokens(self, size: Size, patches: int) -> int:
        """How many tokens, where a tile is `patches` x `patches` of the vision tower's."""
        return tokens(size, self.pinpoints, self.side, patches)

    def __call__(self, frame: Frame) -> Tensor:
        """An RGB frame -> (N, 3, S, S) float32: the whole, then its tiles row by row."""
        pixels = to_pixels(frame)
        H, W = pixels.shape[1:]
        canvas = best_canvas((H, W), self.pinpoints)
        inner = fitted((H, W), canvas)
        top, left = (canvas[0] - inner[0]) // 2, (canvas[1] - inner[1]) // 2
        bottom, right = canvas[0] - inner[0] - top, canvas[1] - inner[1] - left
        squash = self.tile.resize
        squash = (squash, squash) if isinstance(squash, int) else squash
        assert squash is not None
        whole = resize(pixels, squash, self.tile.mode)
        padded = pad(resize(pixels, inner, self.tile.mode), [left, right, top, bottom])
        cuts = [row.split(self.side, dim=2) for row in padded.split(self.side, dim=1)]
        return self.tile([whole, *(tile for row in cuts for tile in row)])


def best_canvas(size: Size, pinpoints: Sequence[Sequence[int]]) -> Size:
    """The pinpoint that keeps most of the image's pixels; of equal ones the least padded, then the
    first."""
    H, W = size

    def merit(canvas: Sequence[int]) -> tuple[int, int]:
        height, width = canvas
        scale = min(width / W, height / H)
        kept = min(int(W * scale) * int(H * scale), W * H)
        return kept, kept - height * width

    height, width = max(pinpoints, key=merit)
    return height, width


def fitted(size: Size, canvas: Size) -> Size:
    """The size at which an image touches its canvas, its shape kept but for rounding up."""
    (H, W), (height, width) = size, canvas
    across, down = width / W, height / H
    if across < down:
        return min(math.ceil(H * across), height), width
    return height, min(math.ceil(W * down), width)


def grid(size: Size, pinpoints: Sequence[Sequence[int]], side: int) -> Size:
    """Rows and columns of tiles, `side` pixels each, on an image's canvas."""
    height, width = best_canvas(size, pinpoints)
    if height % side or width % side:
        raise UnsupportedModel(
            f"image_grid_pinpoints with {height} x {width}, which is not whole tiles of {side}; "
            "give multiples of the vision tower's image_size"
        )
    return height // side, width // side


def tiles(size: Size, pinpoints: Sequence[Sequence[int]], side: int) -> int:
    """N: how many tiles an image of this size becomes, the whole included."""
    height, width = best_canvas(size, pinpoints)
    return math.ceil(height / side) * math.ceil(width / side) + 1


def tokens(size: Size, pinpoints: Sequence[Sequence[int]], side: int, patches: int) -> int:
    """Tokens of an image whose tiles, `side` pixels, are `patches` x `patches` of the tower's.

    Those of the whole, then the rows that `unpad` leaves of the mosaic, a newline behind each.
    """
    down, across = grid(size, pinpoints, side)
    rows, columns = unpadded(size, (down * patches, across * patches))
    return patches * patches + rows * (columns + 1)


def margins(size: Size, canvas: Size) -> Size:
    """How many cells of a canvas, (rows, columns) of any unit, an image of this size leaves free at
    the top, and as many at the bottom; and likewise at the left. One of the two is 0."""
    (H, W), (rows, columns) = size, canvas
    # Rounded before it is cut: 198 * (48 / 352) is 26.999999999999996, and is meant to be 27.
    if W / H > columns / rows:
        return (rows - int(round(H * (columns / W), 7))) // 2, 0
    return 0, (columns - int(round(W * (rows / H), 7))) // 2


def unpadded(size: Size, canvas: Size) -> Size:
    """Rows and columns of a canvas that are left when its `margins` are cut off."""
    (rows, columns), (top, left) = canvas, margins(size, canvas)
    return rows - 2 * top, columns - 2 * left


def unpad(features: Tensor, size: Size) -> Tensor:
    """The mosaic of tiles' features (rows, columns, D) of an image of this size, less `margins`."""
    rows, columns, _ = features.shape
    top, left = margins(size, (rows, columns))
    return features[top : rows - top, left : columns - left]
