"""Decoding by CUDA graphs: the kernels of a step are recorded once, and then launched together.

A step that gives each answer its next token is some hundred kernels, of which many take a GPU less
time than the host takes to launch them. A recording has its shapes and addresses for good, so that
there is one for each `Bucket` of steps: answers are filled up to a power of two, and so are their
tables of blocks. What fills them up writes to a block of the cache that is nobody's and attends to
one token of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vidlm.engine.forward import Newest
from vidlm.engine.kv import PagedKV
from vidlm.engine.options import EngineOptions
from vidlm.errors import InvalidArgument
from vidlm.models.base import VideoModel
from vidlm.nn.linear import bare
from vidlm.nn.step import Pages, Step
from vidlm.nn.upload import refill, upload

MOST = 32  # recordings kept; each holds some megabytes of launches, beside memory that all share
LEAST_BLOCKS = 16  # of a bucket: shorter answers are not worth recordings of their own
WARM_UPS = 2  # runs before a recording, in which libraries set themselves up
_CAPTURING = Lock()  # torch allows one capture at a time in a process, whoever's it is

Run = Callable[[], Tensor]
Capture = Callable[[Run], tuple[Tensor, Callable[[], None]]]


class CudaCapture:
    """Records what runs on a GPU: where its result lies, and what computes it again.

    All recordings of one share their memory, as no two of them run at the same time and nothing
    that one leaves behind is read after the next.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None  # one: cuBLAS has a workspace for each

    def __call__(self, run: Run) -> tuple[Tensor, Callable[[], None]]:
        with _CAPTURING, torch.cuda.device(self._device):
            if self._stream is None:
                self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    run()
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: threads that do something else with the GPU meanwhile may go on.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                made = run()
        return made, graph.replay


@dataclass(frozen=True)
class Bucket:
    """Steps of at most so many answers, of at most so many blocks each.

    All that differs between them is one line of int32, which one copy brings to the GPU: ids,
    positions, slots and lengths (4, rows), then the tables of blocks (rows, width).
    """

    rows: int
    width: int

    @property
    def size(self) -> int:
        return self.rows * (4 + self.width)

    def parts(self, line: Any) -> tuple[Any, Any]:
        """Views of a line, which is an array or a tensor."""
        border = 4 * self.rows
        return line[:border].reshape(4, self.rows), line[border:].reshape(self.rows, self.width)


@dataclass(frozen=True)
class Recording:
    """What a bucket's kernels read, their logits (rows, V), and what launches them."""

    line: Tensor
    logits: Tensor
    replay: Callable[[], None]


class Graphs:
    """The recordings of one model's decoding with one cache.

    spare    the block of the cache that is nobody's
    most     answers of a step; one with more is left to the layers
    capture  records; tests have another than CudaCapture
    """

    def __init__(
        self, model: VideoModel, kv: PagedKV, spare: int, most: int, capture: Capture
    ) -> None:
        assert (spare + 1) * kv.block < 2**31, "slots are counted in 32 bits"
        self._model, self._kv, self._spare, self._most = model, kv, spare, most
        self._capture = capture
        self._recordings: OrderedDict[Bucket, Recording] = OrderedDict()
        self._parts = _parts(model)

    def decode(self, newest: Sequence[Newest]) -> Tensor | None:
        """As `forward.decode`. None where the layers have to be called: for more answers than
        recordings are made for, where hooks want to see them, under autocast."""
        if len(newest) > self._most or not self._kv.layers or not self._unseen():
            return None
        recording = self._recording(self._bucket(newest))
        line = self._line(self._bucket(newest), newest)
        refill(recording.line, torch.from_numpy(line))
        recording.replay()
        # A copy: the next replay writes to the same place.
        return recording.logits[: len(newest)].to(torch.float32, copy=True)

    def check(self) -> None:
        """Forget what was recorded of a model whose modules are others by now."""
        if self._parts != _parts(self._model):
            self.clear()

    def clear(self) -> None:
        self._recordings.clear()
        self._parts = _parts(self._model)

    def _unseen(self) -> bool:
        return all(map(bare, self._parts)) and not torch.is_autocast_enabled("cuda")

    def _bucket(self, newest: Sequence[Newest]) -> Bucket:
        blocks = max(_blocks(token, self._kv.block) for token in newest)
        width = max(_power(blocks), LEAST_BLOCKS)
        return Bucket(min(_power(len(newest)), self._most), min(width, self._spare))

    def _recording(self, bucket: Bucket) -> Recording:
        if bucket not in self._recordings:
            while len(self._recordings) >= MOST:
                self._recordings.popitem(last=False)
            # Of nobody's tokens: the warm-ups are runs like any other.
            line = upload(torch.from_numpy(self._line(bucket)), self._kv.device)
            made, replay = self._capture(partial(self._run, bucket, line))
            self._recordings[bucket] = Recording(line, made, replay)
        self._recordings.move_to_end(bucket)
        return self._recordings[bucket]

    def _line(self, bucket: Bucket, newest: Sequence[Newest] = ()) -> NDArray[np.int32]:
        """The newest tokens, filled up with tokens of nobody's."""
        block, line = self._kv.block, np.full(bucket.size, self._spare, np.int32)
        tokens, tables = bucket.parts(line)
        tokens[:] = np.array([0, 0, self._spare * block, 1])[:, None]
        for i, token in enumerate(newest):
            row, at, count = token.table.row, token.stop - 1, _blocks(token, block)
            slot = int(row[at // block]) * block + at % block
            tokens[:, i] = token.id, at, slot, token.stop
            tables[i, :count] = row[:count]
        return line

    def _run(self, bucket: Bucket, line: Tensor) -> Tensor:
        """Logits (rows, V); what is recorded. No shape depends on what is in the line, and nothing
        waits for the GPU."""
        model, kv = self._model, self._kv
        tokens, tables = bucket.parts(line)
        ids, positions, slots = tokens[:3].long()
        pages = Pages(kv.layer, kv.block, tables, tokens[3], slots, ())
        step = Step(positions, (1,) * bucket.rows, pages=pages)
        return model.logits(model.hidden(model.embed(ids), step))


def graphs_for(model: VideoModel, kv: PagedKV, spare: int, options: EngineOptions) -> Graphs | None:
    """Those that the options ask for. Raises InvalidArgument where the model can have none."""
    if not options.cuda_graphs:
        return None
    why = None
    if model.device.type != "cuda":
        why = f"it is on {model.device.type}"
    elif model.has_memory:
        why = "its layers attend to a memory, which is of another size for every video"
    elif {*model.layer_devices} != {model.device} or any(
        "forward" in vars(p) for p in _parts(model)
    ):
        why = "its layers are on several devices or wait on another"
    if why is not None:
        raise InvalidArgument(
            f"cuda_graphs=True for a model that cannot be recorded: {why}; leave the option out"
        )
    return Graphs(model, kv, spare, options.max_sequences, CudaCapture(model.device))


def _parts(model: VideoModel) -> tuple[nn.Module, ...]:
    """All modules that a step of decoding calls."""
    return (*model.decoder.modules(), model.head)


def _blocks(token: Newest, block: int) -> int:
    return -(-token.stop // block)


def _power(count: int) -> int:
    """The power of two that is not smaller."""
    return 1 << (count - 1).bit_length()
