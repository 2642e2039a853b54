"""native/memory.py: tensors side by side in large pages."""

from __future__ import annotations

import gc
import mmap
import pickle
import weakref
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidlm.native import memory
from vidlm.native.memory import CHUNK, PAGE, LargePages, Spare, keep_freed

SHAPES = st.lists(st.integers(0, 90), max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.float64])
linux = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has none")


@settings(max_examples=50)
@given(st.lists(st.tuples(SHAPES, DTYPES), min_size=1, max_size=8))
def test_each_has_memory_of_its_own(wanted: list[tuple[tuple[int, ...], torch.dtype]]) -> None:
    pages = LargePages()
    made = [pages.empty(shape, dtype) for shape, dtype in wanted]
    for number, tensor in enumerate(made):
        tensor.fill_(number)
    for number, (tensor, (shape, dtype)) in enumerate(zip(made, wanted, strict=True)):
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
        assert tensor.is_contiguous()
        assert tensor.numel() == 0 or tensor.data_ptr() % 64 == 0
        assert bool((tensor == number).all())


@linux
def test_chunks_begin_at_large_pages_and_hold_several(monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = []
    real = memory._mapped
    monkeypatch.setattr(memory, "_mapped", lambda size: mapped.append(real(size)) or mapped[-1])
    pages = LargePages()
    first, second = (pages.empty((3, 100), torch.float32) for _ in range(2))
    large = pages.empty((CHUNK + 1,), torch.int8)
    assert second.data_ptr() - first.data_ptr() == 1216  # 1200, and to the next line
    assert [tensor.data_ptr() % PAGE for tensor in (first, large)] == [0, 0]
    assert [stop - first for _, first, stop in mapped] == [CHUNK, CHUNK + PAGE]


@linux
def test_tensors_keep_their_memory_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mapped(mmap.mmap):
        """Can be looked at from afar."""

    held = []
    monkeypatch.setattr(mmap, "mmap", lambda *given, **more: kept(Mapped(*given, **more), held))
    pages = LargePages()
    tensor = pages.empty((1000,), torch.float32).fill_(7)
    del pages
    gc.collect()
    assert held[0]() is not None
    assert bool((tensor == 7).all())
    del tensor
    gc.collect()
    assert held[0]() is None


def kept(made: mmap.mmap, held: list[weakref.ref[mmap.mmap]]) -> mmap.mmap:
    held.append(weakref.ref(made))
    return made


@linux
def test_a_system_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *given: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    assert bool((LargePages().empty((5,), torch.float32).fill_(2) == 2).all())


def test_other_systems_and_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_mapped", lambda size: pytest.fail("it was mapped"))
    assert LargePages().empty((4, 5), torch.float32, torch.device("meta")).shape == (4, 5)
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert LargePages().empty([4, 5], torch.bfloat16).shape == (4, 5)


class Malloc:
    """A C library that notes what it is told."""

    def __init__(self, known: bool = True) -> None:
        self.told: list[tuple[int, int]] = []
        if known:
            self.mallopt = lambda name, value: self.told.append((name, value)) or 1


@pytest.mark.parametrize(
    ("environment", "kept"),
    [
        ({"HOME": "/home/me"}, True),
        ({"GLIBC_TUNABLES": "glibc.cpu.x86_shstk=off"}, True),
        ({"GLIBC_TUNABLES": "glibc.cpu.x86_shstk=off:glibc.malloc.hugetlb=1"}, False),
        ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False),
    ],
)
def test_freed_memory_is_kept_unless_the_environment_has_a_say(
    environment: dict[str, str], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Malloc()
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: library)
    assert keep_freed(environment) is kept
    assert library.told == ([(-3, 32 << 20), (-1, 256 << 20)] if kept else [])


def test_other_mallocs_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: Malloc(known=False))
    assert not keep_freed({})
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("it was asked"))
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert not keep_freed({})


@linux
def test_the_real_one_takes_it() -> None:
    assert keep_freed({}) == hasattr(memory.ctypes.CDLL(None), "mallopt")


# ---- Spare -----------------------------------------------------------------------------------


def test_a_task_gets_the_memory_of_the_one_before_if_it_is_large_enough() -> None:
    spare, places = Spare(), []
    for size in (4096, 1000, 8192):
        with spare.lent(size) as arena:
            tensor = arena.empty((size // 4,), torch.float32).fill_(1)
            places.append(tensor.data_ptr())
            del tensor
    assert places[1] == places[0]
    assert [len(kept) for kept in spare._kept] == [8192]


def test_what_does_not_fit_is_elsewhere() -> None:
    with Spare().lent(256) as arena:
        inside, outside = (arena.empty((40,), torch.float32).fill_(i) for i in range(2))
    assert outside.untyped_storage().data_ptr() != inside.untyped_storage().data_ptr()
    assert (inside.tolist(), outside.tolist()) == ([0.0] * 40, [1.0] * 40)


def test_tasks_at_the_same_time_have_memory_of_their_own() -> None:
    spare = Spare()
    with spare.lent(64) as one, spare.lent(64) as other:
        first, second = (arena.empty((16,), torch.float32) for arena in (one, other))
        first.fill_(1)
        second.fill_(2)
        assert first.tolist() == [1.0] * 16
    assert len(spare._kept) == 1


def test_too_much_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SPARE", 100)
    spare = Spare()
    for size, kept in ((101, 0), (100, 1)):
        with spare.lent(size):
            pass
        assert len(spare._kept) == kept


def test_memory_of_inference_mode_serves_outside_of_it() -> None:
    spare = Spare()
    with torch.inference_mode(), spare.lent(64):
        pass
    with spare.lent(64) as arena:
        arena.empty((16,), torch.float32).fill_(3)


def test_copies_have_none() -> None:
    spare = Spare()
    with spare.lent(64):
        pass
    assert spare._kept
    for copy in (deepcopy(spare), pickle.loads(pickle.dumps(spare))):
        assert not copy._kept
