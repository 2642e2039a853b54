"""A model and its processor behind a few words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Unpack

from vidlm.api.answer import Answer, AnswerStream
from vidlm.api.chat import Chat
from vidlm.api.handle import VideoHandle
from vidlm.api.index_fields import Identity
from vidlm.api.index_file import is_index
from vidlm.api.keywords import AskKeywords, FrameKeywords, read_frames, spelled
from vidlm.api.progress import Progress, ProgressHook, silent
from vidlm.api.sources import NOTHING, Picture, Source, Sources, check_order, listed
from vidlm.engine import Engine, EngineOptions, Timings
from vidlm.engine.store import weights_stamp
from vidlm.errors import InvalidArgument
from vidlm.fingerprint import fingerprint
from vidlm.hf import (
    AutoModelForImageTextToText,
    AutoProcessor,
    ForConditionalGeneration,
    ProcessorMixin,
    find,
)
from vidlm.hf.loading import read_load_options
from vidlm.media import MediaReader
from vidlm.quant import preset, scheme_of


def load(
    name: str | Path,
    *,
    dtype: Any = None,
    device: Any = None,
    quantize: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    engine: EngineOptions | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    media: MediaReader | None = None,
    progress: ProgressHook | None = None,
) -> LM:
    """Load a model and its processor from a folder, a hub repository, or "demo".

    dtype   a torch dtype or its name; None: what the checkpoint is stored in
    device  as device_map of `from_pretrained`: "cpu", "cuda", "auto", "balanced"; None: the CPU
    quantize  "int8", "int4" or "nf4": all linear layers in fewer bits, the head in 8, as they are
            read; see docs/quantization.md
    engine  how much it may remember, and whether answers must be exact; see EngineOptions
    max_memory  what weights may take of each device, with device="auto", "balanced",
            "balanced_low_0" or "sequential": {0: "20GiB", "cpu": "60GiB"}
    media   which files and URLs sources may name, and the limits of reading them; see MediaReader
    progress  is called with a Progress as the stages "resolve" and "load" begin and end
    Raises ModelNotFound, HubUnreachable, UnsupportedModel or WeightsError; InvalidArgument for a
    value that is not allowed, and where weights have no room in max_memory.
    """
    how = {
        "dtype": dtype,
        "device_map": device,
        "max_memory": max_memory,
        "quantization_config": None if quantize is None else preset(quantize),
    }
    read_load_options(how)  # a wrong word is refused before anything is downloaded
    report = progress or silent
    report(Progress("resolve", 0, 1))
    folder = find(name, revision=revision, local_files_only=local_files_only)  # of one commit
    processor = AutoProcessor.from_pretrained(folder, media=media)
    report(Progress("resolve", 1, 1))
    report(Progress("load", 0, 1))
    model = AutoModelForImageTextToText.from_pretrained(folder, **how)
    report(Progress("load", 1, 1))
    return LM(model, processor, engine)


class LM:
    """A model that answers questions about videos and images.

    A source is a path, a URL, the bytes of a file, an open file, an array of frames, a loaded
    `Video`, a PIL image, a `VideoHandle`, or, inside a list of sources, a list of images: the
    frames of one video. A path that ends with .safetensors is a video that `VideoHandle.save`
    wrote. docs/python.md has a table of the keywords of `ask`, `stream`, `chat` and `video`; they
    are `AskKeywords` and `FrameKeywords` of vidlm.api.

    All questions share one `engine`, which remembers videos and prompts; those of several threads
    are answered together. `engine.stats` tells what it does, `engine.clear()` makes it forget.
    """

    def __init__(
        self,
        model: ForConditionalGeneration,
        processor: ProcessorMixin,
        options: EngineOptions | None = None,
    ) -> None:
        if options is not None and not isinstance(options, EngineOptions):
            raise InvalidArgument(f"engine={options!r}; allowed: None, or EngineOptions(...)")
        self.model = model
        self.processor = processor
        self.engine = Engine(model, tokenizer=processor.tokenizer, options=options)
        self._identity: tuple[object, Identity] | None = None

    @property
    def identity(self) -> Identity:
        """What a saved video must agree with. Reads all weights where they are new."""
        stamp = weights_stamp(self.model)
        if self._identity is None or self._identity[0] != stamp:
            config, packed = self.model.config, self.model.quantization_config
            dtype = str(self.model.dtype).removeprefix("torch.")
            said = {**config.to_dict(), "torch_dtype": None, "dtype": None}  # told by `dtype`
            words = json.dumps(said, sort_keys=True).encode()
            made = Identity(
                model_type=config.model_type,
                dtype=dtype,
                config=blake2b(words, digest_size=16).hexdigest(),
                weights=fingerprint(self.model, self.model.renames()),
                exact=self.engine.options.exact,
                kv_dtype=self.engine.options.kv_dtype,
                scheme=dtype if packed is None else str(scheme_of(packed)),
            )
            self._identity = stamp, made
        return self._identity[1]

    def __repr__(self) -> str:
        kind, model = type(self.model).__name__, self.model
        packed = model.quantization_config
        weights = str(model.dtype).removeprefix("torch.")
        if packed is not None:
            weights = f"{scheme_of(packed)} and {weights}"
        return f"<LM {kind}, {weights}, {model.device}>"

    def video(
        self, source: Source | Sequence[Picture], **options: Unpack[FrameKeywords]
    ) -> VideoHandle:
        """Read and prepare a source once, to ask about it as often as you like.

        A list is the frames of one video. A path that ends with .safetensors is one that
        `VideoHandle.save` wrote. Raises MediaError where the source cannot be read,
        InvalidArgument where a saved video is not of this model.
        """
        frames = read_frames(options, "lm.video()")
        listed(source)
        with spelled(options):
            if isinstance(source, VideoHandle):
                return source.checked(self, frames)
            if isinstance(source, str | Path) and is_index(source):
                return VideoHandle.load(self, Path(source), frames)
            return VideoHandle.read(self, source, frames, Timings())

    def ask(self, media: Sources, question: str, **options: Unpack[AskKeywords]) -> Answer:
        """Answer one question about one source or a list of them, in the order given.

        Raises MediaError where a source cannot be read, ContextOverflow where question and frames
        do not fit, InvalidArgument on a value that is not allowed, UnknownKeyword (a TypeError) on
        an unknown keyword.
        """
        return self.stream(media, question, **options).answer

    def stream(self, media: Sources, question: str, **options: Unpack[AskKeywords]) -> AnswerStream:
        """Like `ask`, piece by piece."""
        check_order(media, question)
        return Chat(self, media, **options).stream(question)

    def chat(self, media: Sources = NOTHING, **options: Unpack[AskKeywords]) -> Chat:
        """A conversation about the media, or without any: `lm.chat()`. Each question builds on the
        ones before."""
        return Chat(self, media, **options)
