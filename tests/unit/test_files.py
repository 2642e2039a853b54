"""Whatever is written appears whole or not at all, and an older file outlives every failure."""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import tiny
import vidlm
from vidlm import files, weights
from vidlm.demo import recipe, train, world
from vidlm.errors import OutputError
from vidlm.files import Replacement, append_line, make_folder, replaced, write_files

# ---- failures ----------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Real writes fail, of any library: like a disk with so much room for each file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def refusing(function: str, at: int, code: int = errno.ENOSPC) -> Iterator[None]:
    """The call number `at` of os.`function`, and those behind it, fail."""
    real, calls = getattr(os, function), 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > at and calls <= at + 1:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, function, call)
        yield


FAILURES: dict[str, Callable[[], Any]] = {
    "no room at all": lambda: files_of_at_most(0),
    "room for some": lambda: files_of_at_most(700),
    **{f"flush {n}": lambda n=n: refusing("fsync", n) for n in range(3)},
    **{f"rename {n}": lambda n=n: refusing("replace", n, errno.EIO) for n in range(3)},
    "moving aside": lambda: refusing("rename", 0, errno.EACCES),
}


def content(folder: Path) -> dict[str, bytes]:
    """Of every file, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- the helpers -------------------------------------------------------------------------------


def test_a_file_is_replaced_with_its_mode_and_new_ones_follow_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_files(tmp_path, {"a.txt": "one"})
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    path.chmod(0o640)
    with replaced(path) as partial:
        partial.write_text("two")
        assert path.read_text() == "one"
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("two", 0o640)
    with replaced(tmp_path / "b", mode=files.PRIVATE) as partial:
        partial.touch()
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o600
    assert sorted(content(tmp_path)) == ["a.txt", "b"]


def test_a_link_is_followed_and_a_device_is_written_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("one")
    (tmp_path / "link.txt").symlink_to("real.txt")
    with replaced(tmp_path / "link.txt") as partial:
        partial.write_text("two")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "two"
    with replaced("/dev/null") as partial:
        partial.write_text("two")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(OutputError, match=r"/dev/full could not be written \(No space"):
        files.write_bytes("/dev/full", b"two")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, MemoryError])
def test_any_error_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "a").write_text("one")

    def interrupted() -> None:
        with replaced(tmp_path / "a") as partial:
            partial.write_text("two")
            raise error

    with pytest.raises(error):
        interrupted()
    assert content(tmp_path) == {"a": b"one"}


def test_errors_name_the_path_and_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "folder").mkdir()
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: make_folder(tmp_path / "notes.txt"), r"notes\.txt could not be made .*name a f"),
        (lambda: make_folder(tmp_path / "notes.txt" / "x"), "x could not be made .*name a folder"),
        (lambda: files.write_bytes(tmp_path / "nodir" / "x", b""), "nodir does not exist.*make it"),
        (lambda: files.write_bytes(tmp_path / "folder", b""), "it is a folder.*name a file in it"),
        (lambda: files.write_bytes(tmp_path / "notes.txt" / "x", b""), "in the way.*remove"),
        (lambda: append_line(tmp_path / "nodir" / "x", "line"), "nodir does not exist"),
    ]
    for act, said in cases:
        with pytest.raises(OutputError, match=said) as caught:
            act()
        assert isinstance(caught.value, OSError)
        assert caught.value.errno
    for code, said in ((errno.ENOSPC, "free some space"), (errno.EROFS, "choose another place")):
        with refusing("open", 0, code), pytest.raises(OutputError, match=f"x could not.*{said}"):
            files.write_bytes(tmp_path / "x", b"")
    assert content(tmp_path) == {"notes.txt": b"notes"}


def test_a_log_gets_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append_line(path, '{"step": 1}')
    with files_of_at_most(15), pytest.raises(OutputError, match="log"):
        append_line(path, '{"step": 2}')
    assert path.read_text() == '{"step": 1}\n'
    append_line(path, '{"step": 2}')
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("how", FAILURES)
def test_several_files_are_replaced_together(tmp_path: Path, how: str) -> None:
    old = {"a": b"old" * 100, "b": b"old", "stale": b"old"}
    write_files(tmp_path, old)

    def replace_them() -> None:
        with Replacement(tmp_path) as group:
            group.write(dict.fromkeys(("a", "b", "c"), b"new" * 400))
            group.drop(tmp_path / "stale")

    with pytest.raises(OutputError), FAILURES[how]():
        replace_them()
    assert content(tmp_path) == old


def test_without_hard_links(tmp_path: Path) -> None:
    old = {"a": b"old", "b": b"old"}
    write_files(tmp_path, old)
    with refusing("link", 0, errno.EPERM), refusing("replace", 1), pytest.raises(OutputError):
        write_files(tmp_path, {"a": b"new", "b": b"new"})
    assert content(tmp_path) == old
    with refusing("link", 0, errno.EPERM):
        write_files(tmp_path, {"a": b"new", "b": b"new"})
    assert content(tmp_path) == {"a": b"new", "b": b"new"}


# ---- everything that the package writes --------------------------------------------------------


def a_network(seed: int) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Sequential(*(torch.nn.Linear(12, 12) for _ in range(4)))


def numbers(folder: Path) -> dict[str, torch.Tensor]:
    """As a reader finds them: by the index where there is one."""
    found = {path: load_file(path) for path in set(weights.weight_files(folder).values())}
    return {name: found[path][name] for name, path in weights.weight_files(folder).items()}


@pytest.mark.parametrize("how", FAILURES)
@pytest.mark.parametrize("shards", [(500, 500), (500, 1 << 20), (1 << 20, 500), (500, 1300)])
def test_weights_outlive_a_failing_save(tmp_path: Path, how: str, shards: tuple[int, int]) -> None:
    weights.save(a_network(1), tmp_path, shard=shards[0], beside={"config.json": "{}"})
    before, kept = content(tmp_path), numbers(tmp_path)
    new_text, failed = "[]" * 999, False
    with FAILURES[how]():
        try:
            weights.save(a_network(2), tmp_path, shard=shards[1], beside={"config.json": new_text})
        except OutputError as error:
            failed = "could not be written" in str(error)
    if failed:
        assert content(tmp_path) == before
    else:  # nothing to move aside, or not so many files to rename
        assert how in ("moving aside", "rename 2")
        assert (tmp_path / "config.json").read_text() == new_text
    weights.save(a_network(2), tmp_path, shard=shards[1], beside={"config.json": "[]"})
    new = {name: tensor.detach() for name, tensor in a_network(2).named_parameters()}
    assert all(torch.equal(numbers(tmp_path)[name], new[name]) for name in kept)
    assert not [name for name in content(tmp_path) if name.startswith(".")]


def test_a_first_save_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError), files_of_at_most(400):
        weights.save(a_network(1), tmp_path / "new", shard=500)
    assert content(tmp_path) == {}


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> vidlm.LM:
    return vidlm.load(tiny.write(tmp_path_factory.mktemp("tiny")))


def clip() -> world.Clip:
    return world.draw_clip(np.random.default_rng(0))


def a_sheet(path: Path) -> None:
    with replaced(path) as partial:
        Image.effect_noise((64, 64), 9).save(partial, "PNG")


def a_tokenizer() -> Any:
    return recipe.train_tokenizer(["a red ball moves", "to the left"])


WRITERS: dict[str, Callable[[vidlm.LM, Path], Any]] = {
    "model": lambda lm, out: lm.model.save_pretrained(out),
    "processor": lambda lm, out: lm.processor.save_pretrained(out),
    "image processor": lambda lm, out: vidlm.VideoLlavaImageProcessor().save_pretrained(out),
    "tokenizer": lambda lm, out: lm.processor.tokenizer.save(out),
    "index": lambda lm, out: lm.video(tiny.picture(3)).save(out / "video.safetensors"),
    "clip": lambda lm, out: world.write_mp4(clip(), out / "clip.mp4", 64),
    "sheet": lambda lm, out: a_sheet(out / "sheet.png"),
    "state of a training": lambda lm, out: train.store({"x": a_network(1)}, 3, out / "x.pt"),
    "files of the demo": lambda lm, out: recipe.write_files(out, a_tokenizer()),
}


@pytest.mark.parametrize("what", WRITERS)
@pytest.mark.parametrize("how", ["no room at all", "room for some", "flush 0", "rename 0"])
def test_what_is_there_outlives_a_failing_write(
    lm: vidlm.LM, tmp_path: Path, what: str, how: str
) -> None:
    write = WRITERS[what]
    failure = (lambda: files_of_at_most(100)) if how == "room for some" else FAILURES[how]
    with pytest.raises(OutputError, match=str(tmp_path)), failure():
        write(lm, tmp_path)
    assert content(tmp_path) == {}
    write(lm, tmp_path)
    before = content(tmp_path)
    assert before
    with pytest.raises(OutputError, match=str(tmp_path)), failure():
        write(lm, tmp_path)
    assert content(tmp_path) == before
