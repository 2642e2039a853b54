"""engine/graphs.py: sizes of recordings, how they are made, and what their stand-in refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import devices
from recorded import Recorder, Unsafe
from straight import tiny_model
from vidlm.engine import graphs
from vidlm.engine.forward import Newest
from vidlm.engine.graphs import CudaCapture, Graphs
from vidlm.engine.kv import PagedKV, Table
from vidlm.engine.options import BLOCK

GPU = torch.device("cuda:0")


@given(count=st.integers(1, 100), stop=st.integers(1, 5000), most=st.integers(1, 100))
def test_buckets(count: int, stop: int, most: int) -> None:
    """Few, and large enough."""
    spare = 320  # no answer has more blocks
    made = Graphs(tiny_model(), PagedKV(spare + 1, BLOCK), spare, most, Recorder())
    count = min(count, most)
    bucket = made._bucket([Newest(1, stop, Table([]), None)] * count)
    assert bucket.rows in {1, 2, 4, 8, 16, 32, 64, most}
    assert count <= bucket.rows <= min(2 * count, most)
    assert bucket.width in {16, 32, 64, 128, 256, spare}
    assert stop <= bucket.width * BLOCK <= max(2 * (stop + BLOCK), 16 * BLOCK)
    tokens, tables = bucket.parts(torch.arange(bucket.size))
    assert (tokens.shape, tables.shape) == ((4, bucket.rows), (bucket.rows, bucket.width))


def test_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm on a stream of its own, recorded there, in the memory of those before."""
    said: list[Any] = []

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            said.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def within(what: Any, **how: Any) -> Iterator[None]:
        told = {name: getattr(value, "name", value) for name, value in how.items()}
        said.append(("enter", getattr(what, "name", what), *told.items()))
        yield
        said.append("leave")

    class Graph:
        name = "graph"

        def replay(self) -> None:
            said.append("replay")

    current, pools = Stream("current"), iter(["pool", "another pool"])
    for name, stand_in in {
        "Stream": Stream,
        "current_stream": lambda: current,
        "stream": within,
        "device": within,
        "graph": within,
        "CUDAGraph": Graph,
        "graph_pool_handle": lambda: next(pools),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    capture = CudaCapture(GPU)
    for i in range(2):
        made, replay = capture(lambda i=i: said.append("run") or torch.full((1,), i))
        replay()
        assert made.item() == i
        how = (("pool", "pool"), ("stream", "side"), ("capture_error_mode", "thread_local"))
        assert said == [
            *(("enter", GPU), "side waits for current", ("enter", "side")),
            *["run"] * graphs.WARM_UPS,
            *("leave", "current waits for side", ("enter", "graph", *how)),
            *("run", "leave", "leave", "replay"),
        ]
        said.clear()


def test_what_the_recorder_refuses() -> None:
    """What these tests go by."""
    x = torch.arange(4.0)
    for unsafe in (
        lambda: x[x > 1],
        lambda: x.sum().item() + x,
        lambda: x + torch.tensor([1.0]),
        lambda: x.nonzero(),
    ):
        with pytest.raises(Unsafe):
            Recorder()(unsafe)
    with devices.gpus(), pytest.raises(Unsafe, match="between devices"):
        Recorder()(lambda: x.to("cuda"))
    numbers = iter(range(9))
    _, replay = Recorder()(lambda: x + next(numbers))
    with pytest.raises(AssertionError, match="not recorded"):
        replay()
    _, replay = Recorder()(lambda: x + torch.ones(4))
    replay()
