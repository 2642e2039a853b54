"""VideoLLaMA3: frames of any size, only what changes between them, and when each was seen.

Paper: VideoLLaMA 3 (arXiv 2501.13106). Checkpoints: lkhl/VideoLLaMA3-2B-Image-HF in transformers'
layout, DAMO-NLP-SG/VideoLLaMA3-2B, -7B, -2B-Image, -7B-Image in the authors' own; Qwen2.5.
Reference: transformers, models/video_llama_3. Parity: tests/parity/test_video_families.py, and of
the authors' layout test_videollama3_native.py. Where the authors' processor differs, transformers'
is followed; theirs has the name rule="native" (vidlm.vision.patches says how they differ).

Tokens: of an image one for 14 x 14 pixels, at most 16,384; of a frame one for 28 x 28, of at most
16,384 for the whole video, less those whose pixels repeat the frame before. The prompt names the
time of every frame: "Time 0.0s:", its tokens, ",", and so on.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vidlm.errors import InvalidArgument, ModelError, UnsupportedModel
from vidlm.files import write_files
from vidlm.hub import read_config, read_json
from vidlm.media import Video
from vidlm.models.base import Encoded, Family, Kind, Media, Rows, VideoModel
from vidlm.models.tower import check_placeholders, layer_numbers
from vidlm.nn.decoder import Decoder, DecoderConfig
from vidlm.nn.upload import upload
from vidlm.text import Tokenizer
from vidlm.vision.navit import PATCHES, NaViT, NaViTConfig
from vidlm.vision.patches import Grid, Patchify, Rule, sizes_of_call
from vidlm.weights import Renames

NATIVE = "videollama3_qwen2"  # model_type of the authors' layout
NATIVE_PROJECTOR = "mlp2x_gelu"  # the one that was published, and its class's default
# Of a revision on the hub from before transformers took the model in and renamed it.
EARLY_VISION = "videollama3_vision"
PROCESSOR_FILE = "processor_config.json"
IMAGES_FILE = "preprocessor_config.json"
VIDEOS_FILE = "video_preprocessor_config.json"
TOKENIZER_FILE = "tokenizer_config.json"
LATEST = 1e9  # seconds: no frame of a video comes later
IMAGE_TOKEN, VIDEO_TOKEN = "<|image_pad|>", "<|video_pad|>"
QWEN_VIDEO_ID = 151656  # of VIDEO_TOKEN; the native layout has one token for images and frames
NATIVE_IMAGE_ID = 151665  # of that one, "<image>"


@dataclass(frozen=True)
class VideoLlama3Config:
    """config.json of a VideoLLaMA3 checkpoint, in either layout.

    `text_config` and `vision_config` may be given as mappings, whose absent keys take the defaults
    of their model_type, or left out.
    """

    model_type = "video_llama_3"

    text_config: DecoderConfig = None  # type: ignore[assignment]  # filled in __post_init__
    vision_config: NaViTConfig = None  # type: ignore[assignment]
    image_token_id: int = 151655
    video_token_id: int = QWEN_VIDEO_ID
    dtype: str | None = None

    def __post_init__(self) -> None:
        fill = object.__setattr__
        if not isinstance(self.text_config, DecoderConfig):
            text = {"model_type": "qwen2", **(self.text_config or {})}
            fill(self, "text_config", DecoderConfig.from_dict(text))
        if not isinstance(self.vision_config, NaViTConfig):
            fill(self, "vision_config", NaViTConfig.from_dict(self.vision_config or {}))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> VideoLlama3Config:
        """Read config.json, with either spelling of renamed keys."""
        dtype = config.get("dtype") or config.get("torch_dtype")
        if config.get("model_type") == NATIVE:
            return cls._native(config, dtype)
        known = {f.name for f in fields(cls)}
        values = {key: value for key, value in config.items() if key in known}
        text = dict(values.get("text_config") or {})
        if config.get("tie_word_embeddings"):
            text["tie_word_embeddings"] = True
        vision = dict(values.get("vision_config") or {})
        if vision.get("model_type") == EARLY_VISION:
            vision["model_type"] = NaViTConfig.model_type
        read = {"text_config": text, "vision_config": vision, "dtype": dtype}
        return cls(**{**values, **read})

    @classmethod
    def _native(cls, config: Mapping[str, Any], dtype: str | None) -> VideoLlama3Config:
        """Read the authors' config.json, where the decoder's words lie flat beside the rest."""
        projector = config.get("mm_projector_type", NATIVE_PROJECTOR)
        if projector != NATIVE_PROJECTOR:
            raise UnsupportedModel(
                f"mm_projector_type={projector!r} in config.json; supported: {NATIVE_PROJECTOR!r}, "
                "which the published checkpoints have"
            )
        text: Any = {**config, "model_type": "qwen2"}
        vision: Any = config.get("vision_encoder_config")
        return cls(text, vision, config.get("image_token_index", NATIVE_IMAGE_ID), dtype=dtype)

    def to_dict(self) -> dict[str, Any]:
        """A config.json that transformers reads too."""
        values = {
            "architectures": ["VideoLlama3ForConditionalGeneration"],
            "model_type": self.model_type,
            "tie_word_embeddings": self.text_config.tie_word_embeddings,
            "text_config": self.text_config.to_dict(),
            "vision_config": self.vision_config.to_dict(),
            "image_token_id": self.image_token_id,
            "video_token_id": self.video_token_id,
        }
        return values if self.dtype is None else {**values, "torch_dtype": self.dtype}

    @property
    def placeholders(self) -> Mapping[Kind, int]:
        return {"image": self.image_token_id, "video": self.video_token_id}

    @property
    def max_context(self) -> int:
        return int(self.text_config.max_position_embeddings * self.text_config.rope_factor)

    @property
    def time_tokens(self) -> int:
        """Of the text around a frame's placeholders at most, "Time 9999.0s:" and ",": Qwen2.5's
        tokenizer has one for each digit."""
        return 11

    def video_tokens(self, frames: int) -> int:
        pixels = Patchify.from_dict({"patch_size": self.vision_config.patch_size}, video=True)
        return pixels.tokens(frames, 720, 1280) if frames else 0

    def held_bytes(self, frames: int, itemsize: int) -> int:
        merged = 2 * self.vision_config.patch_size  # pixels of a side of what becomes a token
        number = 3 * merged**2 * 4 + self.text_config.hidden_size * itemsize
        return self.video_tokens(frames) * number

    def tower_bytes(self, itemsize: int) -> int:
        vision = self.vision_config
        turned = 3 * 4 * vision.hidden_size  # queries or keys, rotated in float32
        return PATCHES * (itemsize * layer_numbers(vision) + turned)


# Ours are transformers' names; the authors' file has the decoder one level higher.
RENAMES = Renames(
    table=(
        (r"^model\.vision_encoder\.", "model.vision_model."),
        (r"^model\.mm_projector\.", "model.projector."),
        (r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
    ),
    ignored=(r"rotary_(pos_)?emb\.inv_freq$",),
)


@dataclass(frozen=True, eq=False)
class Patches(Media):
    """pixels (t * h * w, 3 * patch^2) of an image or video in merge-block order.

    grid   (t, h, w) patches: frames, downwards, across
    merge  side of the block of patches that becomes a token
    kept   (t * h * w / merge^2) bool: which tokens the prompt has; None: all
    times  seconds of each frame of a video
    """

    grid: Grid = (1, 1, 1)
    merge: int = 1
    kept: Tensor | None = None
    times: tuple[float, ...] = field(default=())

    def flaw(self) -> str | None:
        frames, high, across = self.grid
        if not (self.merge and frames * high * across):
            return f"a grid of {self.grid} in blocks of {self.merge}"
        if high % self.merge or across % self.merge or frames != self.frames:
            return f"a grid of {self.grid} in blocks of {self.merge} for {self.frames} frames"
        count = frames * high * across // self.merge**2
        if self.kept is not None:
            if self.kept.dtype != torch.bool or self.kept.shape != (count,):
                return f"kept is {self.kept.dtype} {tuple(self.kept.shape)}, of {count} tokens"
            count = int(self.kept.sum())
        if count != self.tokens:
            return f"{count} patches are kept, and there are {self.tokens} tokens"
        if self.kind == "video" and (self.kept is None or len(self.times) != frames):
            return f"a video of {frames} frames with {len(self.times)} times"
        if any(not 0 <= time < LATEST for time in self.times):
            return f"times beyond 0 to {LATEST} seconds"
        return None


class VideoLlama3Processor:
    """Images and videos to patches, and what stands for them in a prompt.

    `rule` is whose sizes are followed: "hf", transformers', or "native", the authors'.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_pixels: Patchify,
        video_pixels: Patchify,
        image_token: str = IMAGE_TOKEN,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_pixels, self.video_pixels = image_pixels, video_pixels
        self.image_token, self.video_token = image_token, VIDEO_TOKEN
        for token in (self.image_token, self.video_token):
            if tokenizer.backend.token_to_id(token) is None:
                raise ModelError(
                    f"the tokenizer has no token {token!r}, which stands for media; its files are "
                    "not those of a VideoLLaMA3 checkpoint, download them again"
                )

    @classmethod
    def from_folder(cls, folder: Path, rule: Rule = "hf") -> VideoLlama3Processor:
        """Read a checkpoint's folder in either layout, or one with the processor's files alone."""
        if not any((folder / name).is_file() for name in (PROCESSOR_FILE, IMAGES_FILE)):
            read_config(folder)  # an error that says what the folder is, or that a file is missing
        names = read_json(folder / PROCESSOR_FILE) if (folder / PROCESSOR_FILE).is_file() else {}
        images = names.get("image_processor") or read_json(folder / IMAGES_FILE)
        videos = names.get("video_processor")
        if not videos and (folder / VIDEOS_FILE).is_file():
            videos = read_json(folder / VIDEOS_FILE)
        config = read_config(folder) if (folder / "config.json").is_file() else {}
        native = config.get("model_type") == NATIVE
        if native:  # one file for both, the rest of it elsewhere
            keys = ("image_merge_size", "video_merge_size")
            images = {**images, **{key: names[key] for key in keys if key in names}}
            compress = config.get("use_token_compression", True)  # absent: the class's default
            videos = {"use_token_compression": compress, **images}
        pixels = (
            replace(Patchify.from_dict(images, video=False), rule=rule),
            replace(Patchify.from_dict(videos or {}, video=True), rule=rule),
        )
        token = names.get("image_token") or ("<image>" if native else IMAGE_TOKEN)
        made = cls(Tokenizer.from_folder(folder), *pixels, token)
        if config:
            ids = VideoLlama3Config.from_dict(config).placeholders
            named: dict[Kind, str | None] = {"image": token, "video": VIDEO_TOKEN}
            check_placeholders(made.tokenizer, named, ids, folder)
        return made

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files and those of the processor, which transformers reads too."""
        texts = self.tokenizer.files()
        if self.image_token != IMAGE_TOKEN:  # transformers asks the tokenizer whether it is another
            words = json.loads(texts[TOKENIZER_FILE])
            words["extra_special_tokens"] = {"image_token": self.image_token}
            texts[TOKENIZER_FILE] = json.dumps(words, ensure_ascii=False, indent=2) + "\n"
        shared = {"processor_class": "VideoLlama3Processor"}
        files = {
            IMAGES_FILE: self.image_pixels.to_dict(),
            VIDEOS_FILE: self.video_pixels.to_dict(),
            PROCESSOR_FILE: {"image_token": self.image_token},
        }
        for name, content in files.items():
            texts[name] = json.dumps({**shared, **content}, indent=2) + "\n"
        write_files(folder, texts)

    def media(self, images: Sequence[Any], videos: Sequence[Video] = ()) -> list[Media]:
        """The native rule shares its budget of pixels among all of one call."""
        call = [(self.image_pixels, [image]) for image in images]
        call += [(self.video_pixels, list(video.frames)) for video in videos]
        sizes = sizes_of_call(call)
        made: list[Media] = []
        for i, ((pixels, frames), size) in enumerate(zip(call, sizes, strict=True)):
            rows, grid = pixels(frames, size)
            video = videos[i - len(images)] if i >= len(images) else None
            made.append(self._patches(pixels, rows, grid, video))
        return made

    def _patches(self, pixels: Patchify, rows: Tensor, grid: Grid, video: Video | None) -> Media:
        merge = pixels.merge_size
        if video is None:
            return Patches(rows, len(rows) // merge**2, grid=grid, merge=merge)
        kept = pixels.kept(rows, grid)
        # Of the average rate, as the reference has it, also where a clip's rate varies.
        times = tuple((video.indices / video.fps).tolist())
        return Patches(rows, int(kept.sum()), "video", grid[0], grid, merge, kept, times)

    def places(self, media: Media) -> tuple[str, list[int]]:
        if not isinstance(media, Patches) or media.kind == "image":
            return self.image_token, [media.tokens]
        assert media.kept is not None
        counts = media.kept.view(media.frames, -1).sum(1).tolist()
        return ",".join(f"Time {t:.1f}s:{self.video_token}" for t in media.times), counts


class Projector(nn.Module):
    """Merged patches (M, D of the encoder) -> tokens (M, D of the decoder)."""

    def __init__(self, config: VideoLlama3Config) -> None:
        super().__init__()
        D = config.text_config.hidden_size
        self.readout = nn.Sequential(
            nn.Linear(config.vision_config.hidden_size, D), nn.GELU(), nn.Linear(D, D)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(x)


class Body(nn.Module):
    """Everything but the head, under the name that checkpoints put in front."""

    def __init__(self, config: VideoLlama3Config) -> None:
        super().__init__()
        self.vision_model = NaViT(config.vision_config)
        self.projector = Projector(config)
        self.language_model = Decoder(config.text_config)


class VideoLlama3Network(VideoModel):
    """The network. Parameter names are those of transformers."""

    media_types = (Patches,)

    def __init__(self, config: VideoLlama3Config) -> None:
        super().__init__()
        self.config = config
        text = config.text_config
        self.model = Body(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.tie()

    def _encoding(self, media: Sequence[Media]) -> Generator[None, None, list[Encoded]]:
        """Patches of each image or video -> its (M, D) features, those that are kept."""
        made = []
        for item in media:
            if not isinstance(item, Patches):
                raise InvalidArgument("VideoLLaMA3 takes media as its processor makes them")
            made.append(Encoded((yield from self._tokens(item))))
        return made

    def _tokens(self, item: Patches) -> Generator[None, None, Tensor]:
        encoder, project = self.body.vision_model, self.body.projector
        encoder.check(item.pixels, item.grid, item.merge)
        (t, h, w), block = item.grid, item.merge**2
        kept = item.pixels.new_ones(t * h * w // block).bool() if item.kept is None else item.kept
        tokens, at = Rows(int(kept.sum())), 0
        weight = encoder.embeddings.patch_embedding.weight
        for rows in item.pixels.split(encoder.at_a_time(h * w) * h * w):
            rows = upload(rows, weight.device, weight.dtype)
            merged = encoder(rows, (len(rows) // (h * w), h, w), item.merge)
            here = kept[at : at + len(merged)].nonzero()[:, 0]  # found where the mask is
            at += len(merged)
            tokens.add(project(merged[upload(here, merged.device)]))
            yield
        return tokens.whole()


FAMILY = Family(
    VideoLlama3Config,
    RENAMES,
    VideoLlama3Processor,
    VideoLlama3Network,
    sampling={"sampling": "videollama3", "max_frames": 180},
)
