"""What LLaVA, LLaVA-NeXT-Video and Video-LLaVA have in common: towers of CLIP's kind, whose patches
a projector of two layers turns into tokens, and a config.json of the same words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from vidlm.errors import ModelError, UnsupportedModel
from vidlm.files import write_files
from vidlm.hub import read_config, read_json
from vidlm.models.base import Kind, Media, Rows, VideoModel
from vidlm.nn.activation import activation
from vidlm.nn.decoder import Decoder, DecoderConfig
from vidlm.text import Tokenizer
from vidlm.vision.preprocess import Preprocess
from vidlm.vision.vit import ViTConfig
from vidlm.weights import Renames

PROCESSOR_FILE = "processor_config.json"
IMAGES_FILE = "preprocessor_config.json"
VIDEOS_FILE = "video_preprocessor_config.json"
# Frames encoded at a time: bounds memory whatever the video, and so few that what one half of an
# MLP writes is in the cache still when the other reads it.
CHUNK = 4

Layers = int | tuple[int, ...]


# Modules have transformers 5's names in memory (D), so that adapters and code that name modules fit
# both. Files have those of the hub (A), which are written too: every version of transformers reads
# them. B: 4.52 module names; C: written by 5.x.
RENAMES = Renames(
    table=(
        (r"^(?:model\.)?language_model\.lm_head\.", "lm_head."),
        (r"^(?:model\.)?language_model\.(?:model\.)?", "model.language_model."),
        (r"^(?:model\.)?(vision|image|video)_tower\.(?:vision_model\.)?", r"model.\1_tower."),
        (r"^(?:model\.)?(multi_modal_projector\.|image_newline$)", r"model.\1"),
    ),
    written=(
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.(\w+)_tower\.", r"\1_tower.vision_model."),
        (r"^model\.", ""),
    ),
    ignored=(
        r"rotary_emb\.inv_freq$",
        r"embeddings\.position_ids$",
        r"_tower\.(vision_model\.)?head\.",  # SigLIP's pooling head: not part of these models
    ),
)


@dataclass(frozen=True)
class TowerConfig:
    """config.json under its own names.

    `vision_config` and `text_config` may be given as mappings, whose absent keys take the defaults
    of their model_type, or left out.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    vision_default: ClassVar[Mapping[str, Any]]  # what a config.json without vision_config means
    aliases: ClassVar[Mapping[str, str]] = {"image_token_id": "image_token_index"}

    vision_config: ViTConfig = None  # type: ignore[assignment]  # filled in __post_init__
    text_config: DecoderConfig = None  # type: ignore[assignment]
    image_token_index: int = 32000
    projector_hidden_act: str = "gelu"
    vision_feature_select_strategy: str = "default"
    vision_feature_layer: Layers = -2
    multimodal_projector_bias: bool = True
    dtype: str | None = None

    def __post_init__(self) -> None:
        fill = object.__setattr__
        if not isinstance(self.vision_config, ViTConfig):
            given = self.vision_default if self.vision_config is None else self.vision_config
            fill(self, "vision_config", ViTConfig.from_dict(given))
        if not isinstance(self.text_config, DecoderConfig):
            fill(self, "text_config", DecoderConfig.from_dict(self.text_config or {}))
        if isinstance(self.vision_feature_layer, list):
            fill(self, "vision_feature_layer", tuple(self.vision_feature_layer))
        check_strategy(self.vision_feature_select_strategy)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read config.json, with either spelling of renamed keys."""
        known = {f.name for f in fields(cls)}
        values = {key: value for key, value in config.items() if key in known}
        for alias, name in cls.aliases.items():
            if alias in config:
                values.setdefault(name, config[alias])
        values["dtype"] = config.get("dtype") or config.get("torch_dtype")
        text = dict(values.get("text_config") or {})
        if config.get("tie_word_embeddings"):
            text["tie_word_embeddings"] = True
        return cls(**{**values, "text_config": text})

    def to_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["vision_config"] = self.vision_config.to_dict()
        values["text_config"] = self.text_config.to_dict()
        if isinstance(self.vision_feature_layer, tuple):
            values["vision_feature_layer"] = list(self.vision_feature_layer)
        if self.dtype is None:
            del values["dtype"]
        else:
            values["torch_dtype"] = self.dtype
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "tie_word_embeddings": self.text_config.tie_word_embeddings,
            **values,
        }

    @property
    def image_token_id(self) -> int:
        return self.image_token_index

    @property
    def placeholders(self) -> Mapping[Kind, int]:
        return {"image": self.image_token_index}

    @property
    def max_context(self) -> int:
        """Positions that the decoder was trained with, times what rope_scaling divides them by."""
        return int(self.text_config.max_position_embeddings * self.text_config.rope_factor)

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return as_layers(self.vision_feature_layer)

    def tokens_per_frame(self) -> int:
        """Placeholders of a frame of a video."""
        raise NotImplementedError

    def video_tokens(self, frames: int) -> int:
        return frames * self.tokens_per_frame()

    def held_bytes(self, frames: int, itemsize: int) -> int:
        pixels = 3 * self.vision_config.image_size**2 * 4
        features = self.tokens_per_frame() * self.text_config.hidden_size * itemsize
        return frames * (pixels + features)

    def tower_bytes(self, itemsize: int) -> int:
        vision = self.vision_config
        patches = vision.patches + vision.class_token
        pixels = 2 * 3 * vision.image_size**2  # stacked, and in the weights' dtype
        return itemsize * CHUNK * (pixels + patches * layer_numbers(vision))


@dataclass(frozen=True)
class FrameTokens:
    """How many placeholders a frame gets, in the words of processor_config.json."""

    patch_size: int
    num_additional_image_tokens: int  # 1 for a class token
    vision_feature_select_strategy: str

    @classmethod
    def read(
        cls, folder: Path, names: Mapping[str, Any], config: TowerConfig | None
    ) -> FrameTokens:
        """From config.json, which is what the model obeys: processor_config.json (`names`) has been
        wrong by one on the hub (728 for 729), and counts only in a folder without a model."""
        if config is None:
            missing = [f.name for f in fields(cls) if names.get(f.name) is None]
            if missing:
                raise ModelError(
                    f"{folder} has no config.json, and processor_config.json does not say "
                    f"{', '.join(missing)}; pass the folder or repository of the whole model"
                )
            return cls(**{f.name: names[f.name] for f in fields(cls)})
        vision = config.vision_config
        strategy = config.vision_feature_select_strategy
        return cls(vision.patch_size, int(vision.class_token), strategy)

    def count(self, size: tuple[int, int]) -> int:
        """For pixels of this height and width; "default" drops the first token."""
        patches = (size[0] // self.patch_size) * (size[1] // self.patch_size)
        dropped = self.vision_feature_select_strategy == "default"
        return patches + self.num_additional_image_tokens - dropped


class TowerProcessor:
    """Text and media of one request; a family adds `media` and, if its media differ, `places`."""

    config_class: ClassVar[type[TowerConfig]]
    processor_class: ClassVar[str]  # its name in transformers, and what others' names begin with
    image_class: ClassVar[Any] = Preprocess
    takes_videos: ClassVar[bool] = False  # else a video is its frames as images

    def __init__(
        self, tokenizer: Tokenizer, pixels: tuple[Any, Any], tokens: FrameTokens, names: Any = None
    ) -> None:
        """`pixels` of images and of videos; `names` may hold image_token and video_token."""
        names = names or {}
        self.tokenizer = tokenizer
        self.image_pixels, self.video_pixels = pixels
        self.frame_tokens = tokens
        self.image_token: str = names.get("image_token") or "<image>"
        video_token: str = names.get("video_token") or "<video>"
        self.video_token = video_token if self.takes_videos else None
        for token, kind in ((self.image_token, "an image"), (self.video_token, "a video")):
            if token is not None and tokenizer.backend.token_to_id(token) is None:
                raise ModelError(
                    f"the tokenizer has no token {token!r}, which stands for {kind}; its files are "
                    f"not those of a checkpoint for {self.processor_class}, download them again"
                )

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read a checkpoint's folder, or one with the processor's files alone."""
        own = any((folder / name).is_file() for name in (PROCESSOR_FILE, IMAGES_FILE))
        whole = (folder / "config.json").is_file() or not own  # or an error that says what it is
        config = cls.config_class.from_dict(read_config(folder)) if whole else None
        names = read_json(folder / PROCESSOR_FILE) if (folder / PROCESSOR_FILE).is_file() else {}
        images = names.get("image_processor") or read_json(folder / IMAGES_FILE)
        videos = names.get("video_processor") or images  # one file has been enough for both
        if not names.get("video_processor") and (folder / VIDEOS_FILE).is_file():
            videos = read_json(folder / VIDEOS_FILE)
        pixels = cls.image_class.from_dict(images), Preprocess.from_dict({**videos, "do_pad": None})
        tokens = FrameTokens.read(folder, names, config)
        made = cls(Tokenizer.from_folder(folder), pixels, tokens, names)
        if config is not None:
            named: dict[Kind, str | None] = {"image": made.image_token, "video": made.video_token}
            check_placeholders(made.tokenizer, named, config.placeholders, folder)
        return made

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files and those of the processor, which transformers reads too."""
        shared = {"processor_class": self.processor_class}
        family = self.processor_class.removesuffix("Processor")
        words = {"image_token": self.image_token, **asdict(self.frame_tokens)}
        images = self.image_pixels.to_dict()
        files = {IMAGES_FILE: images, PROCESSOR_FILE: words}
        if self.takes_videos:
            words["video_token"] = self.video_token
            if issubclass(self.image_class, Preprocess):  # others say whose they are
                images["image_processor_type"] = f"{family}ImageProcessor"
            videos = self.video_pixels.to_dict()
            del videos["image_processor_type"]
            files[VIDEOS_FILE] = {**videos, "video_processor_type": f"{family}VideoProcessor"}
        texts = {n: json.dumps({**shared, **c}, indent=2) + "\n" for n, c in files.items()}
        write_files(folder, {**self.tokenizer.files(), **texts})

    def places(self, media: Media) -> tuple[str, list[int]]:
        token = self.image_token if media.kind == "image" else self.video_token
        assert token is not None
        return token, [media.tokens]


def check_placeholders(
    tokenizer: Tokenizer,
    tokens: Mapping[Kind, str | None],
    ids: Mapping[Kind, int],
    folder: Path,
) -> None:
    """Raise ModelError where config.json's `ids` are not those of `tokens`: they changed between
    revisions of LLaVA-NeXT-Video-34B, and the model would wait for what never comes."""
    for kind, expected in ids.items():
        token = tokens[kind]
        id = None if token is None else tokenizer.backend.token_to_id(token)
        if id != expected:
            raise ModelError(
                f"config.json in {folder} says that {expected} stands for {kind}s, the tokenizer "
                f"has {id} for {token!r}; the files are of different versions, download all again"
            )


def as_layers(layer: Layers) -> tuple[int, ...]:
    return (layer,) if isinstance(layer, int) else tuple(layer)


def check_strategy(strategy: str) -> str:
    if strategy not in ("default", "full"):
        raise UnsupportedModel(
            f"vision_feature_select_strategy={strategy!r}; allowed: 'default' (class token "
            "dropped), 'full'"
        )
    return strategy


class Projector(nn.Module):
    """Patches (..., D of the tower) -> tokens (..., D of the decoder)."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        wide = config.vision_config.hidden_size * len(config.feature_layers)
        D, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.linear_1 = nn.Linear(wide, D, bias=bias)
        self.linear_2 = nn.Linear(D, D, bias=bias)
        self.act = activation(config.projector_hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(x)))


class TowerBody(nn.Module):
    """Everything but the head: a family's towers under their names, projector and decoder."""

    def __init__(self, config: TowerConfig, **towers: nn.Module) -> None:
        super().__init__()
        for name, tower in towers.items():
            self.add_module(name, tower)
        self.multi_modal_projector = Projector(config)
        self.language_model = Decoder(config.text_config)


class TowerModel(VideoModel):
    """A family of a `TowerBody` and a head. Parameter names are those of transformers."""

    def __init__(self, config: TowerConfig, body: TowerBody) -> None:
        super().__init__()
        self.config, text = config, config.text_config
        self.model = body
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.tie()


def in_chunks(encode: Callable[[Tensor], Tensor], frames: Tensor) -> Generator[None, None, Tensor]:
    """`encode` over frames (F, 3, H, W), CHUNK of them between two yields -> (F, M, D)."""
    made = Rows(len(frames))
    for part in frames.split(CHUNK):
        made.add(encode(part))
        yield
    return made.whole()


def layer_numbers(vision: Any) -> int:
    """Numbers that a layer of a vision transformer holds of a patch at once, at most: the residual,
    its norm, queries, keys, values and what attention finds; or the hidden layer before and after
    its activation."""
    width = vision.hidden_size
    return 2 * width + max(5 * width, width + 2 * vision.intermediate_size)
