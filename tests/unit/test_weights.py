"""Safetensors into a model: names, shapes, types; and back into files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vidlm import weights
from vidlm.errors import UnsupportedModel, WeightsError
from vidlm.hub import INDEX
from vidlm.weights import Renames, load, save, stored_dtype

PLAIN = Renames()
CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.zeros(()))


class Net(nn.Module):
    """Names on two levels, a number without a shape, and a head that may be tied."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.block = Block()
        self.head = nn.Linear(3, 5, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def empty(tied: bool = False) -> Net:
    with torch.device("meta"):
        return Net(tied)


def tensors(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = dict(Net().named_parameters())
    return {n: torch.randn(p.shape, generator=generator).to(dtype) for n, p in names.items()}


def write(folder: Path, content: Mapping[str, Tensor], name: str = "model.safetensors") -> Path:
    save_file(dict(content), folder / name)
    return folder


def write_index(folder: Path, where: Mapping[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict(where)}))


def read(folder: Path, model: Net | None = None, renames: Renames = PLAIN) -> Net:
    model = model or empty()
    load(model, folder, renames, dtype=torch.float32, device=CPU)
    return model


def assert_holds(model: nn.Module, content: Mapping[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    assert parameters.keys() == content.keys()
    for name, parameter in parameters.items():
        assert torch.equal(parameter, content[name]), name


# ---- reading -----------------------------------------------------------------------------------


def test_every_tensor_arrives(tmp_path: Path) -> None:
    content = tensors()
    model = read(write(tmp_path, content))
    assert_holds(model, content)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_several_files_with_an_index(tmp_path: Path) -> None:
    content = tensors()
    where = {name: f"part{i % 2}.safetensors" for i, name in enumerate(content)}
    for file in set(where.values()):
        write(tmp_path, {n: t for n, t in content.items() if where[n] == file}, file)
    write_index(tmp_path, where)
    assert_holds(read(tmp_path), content)


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    content = tensors()
    seen: list[tuple[int, int]] = []
    write(tmp_path, content)
    how = {"dtype": torch.float32, "device": CPU}
    load(empty(), tmp_path, PLAIN, progress=lambda *at: seen.append(at), **how)
    total = sum(tensor.nbytes for tensor in content.values())
    assert [whole for _, whole in seen] == [total] * len(content)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1][0] == total


def test_names_are_translated_and_unused_ones_passed_over(tmp_path: Path) -> None:
    content = tensors()
    stored = {
        name.replace("block.", "model.block.").replace("embed.", "wte."): tensor
        for name, tensor in content.items()
    }
    stored["model.block.rotary.inv_freq"] = torch.zeros(4)
    renames = Renames(
        table=((r"^model\.block\.", "block."), (r"^wte\.", "embed."), (r"^block\.", "wrong.")),
        ignored=(r"inv_freq$",),
    )
    assert_holds(read(write(tmp_path, stored), renames=renames), content)


@pytest.mark.parametrize("stored", ["twin", "head", "both"])
def test_a_tied_head_is_one_parameter(tmp_path: Path, stored: str) -> None:
    content = tensors()
    content["head.weight"] = content["embed.weight"].clone()
    if stored != "both":
        del content["head.weight" if stored == "twin" else "embed.weight"]
    model = read(write(tmp_path, content), empty(tied=True))
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.embed.weight, content.get("embed.weight", content.get("head.weight")))


@pytest.mark.parametrize("other", ["values", "shape", "dtype"])
def test_a_tied_head_of_its_own_is_refused(tmp_path: Path, other: str) -> None:
    content = tensors()
    head = content["embed.weight"].clone()
    head[4, 2] += 1
    content["head.weight"] = {
        "values": head,
        "shape": head[:4].clone(),
        "dtype": content["embed.weight"].half(),
    }[other]
    with pytest.raises(WeightsError, match=r"ties head\.weight to embed\.weight.*tie_word_embed"):
        read(write(tmp_path, content), empty(tied=True))


def test_tied_values_are_compared_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "CHUNK", 7)
    content = tensors()
    content["head.weight"] = content["embed.weight"].clone()
    read(write(tmp_path, content), empty(tied=True))
    content["head.weight"][-1, -1] += 1
    with pytest.raises(WeightsError, match="differ"):
        read(write(tmp_path, content), empty(tied=True))


# ---- what does not fit -------------------------------------------------------------------------


def test_all_that_is_wrong_is_listed_at_once(tmp_path: Path) -> None:
    content = tensors()
    content["extra.weight"] = content.pop("head.weight")
    content["block.linear.bias"] = torch.zeros(7)
    with pytest.raises(WeightsError) as raised:
        read(write(tmp_path, content))
    said = str(raised.value)
    assert "1 tensors missing: head.weight" in said
    assert "1 tensors left over: extra.weight" in said
    assert "1 tensors of another shape: block.linear.bias (7,) instead of (2,)" in said
    assert str(tmp_path) in said


def test_long_lists_are_cut(tmp_path: Path) -> None:
    content = {**tensors(), **{f"extra{i:03}": torch.zeros(1) for i in range(50)}}
    with pytest.raises(WeightsError, match=r"50 tensors left over: .*extra019 and 30 more"):
        read(write(tmp_path, content))


def test_two_spellings_of_one_name(tmp_path: Path) -> None:
    content = tensors()
    content["old.head.weight"] = content["head.weight"].clone()
    renames = Renames(table=((r"^old\.", ""),))
    with pytest.raises(WeightsError, match=r"'head.weight' twice.*old\.head\.weight"):
        read(write(tmp_path, content), renames=renames)


def test_a_name_in_two_files(tmp_path: Path) -> None:
    content = tensors()
    write(tmp_path, content, "a.safetensors")
    write(tmp_path, {"head.weight": content["head.weight"]}, "b.safetensors")
    with pytest.raises(WeightsError, match=r"'head.weight' is in a\.safetensors and in b\."):
        read(tmp_path)


def test_pickles_are_refused(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match=r"only as pickle \(pytorch_model.bin\)"):
        read(tmp_path)


def test_integers_are_no_weights(tmp_path: Path) -> None:
    content = {**tensors(), "head.weight": torch.ones(5, 3, dtype=torch.int64)}
    with pytest.raises(UnsupportedModel, match=r"stores I64 tensors; supported: F64, F32"):
        read(write(tmp_path, content))


@pytest.mark.parametrize("keep", [0, 7, 30, -1])
def test_a_file_that_was_cut(tmp_path: Path, keep: int) -> None:
    file = write(tmp_path, tensors()) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(WeightsError, match="download it again"):
        read(tmp_path)


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    file = write(tmp_path, tensors()) / "model.safetensors"

    def cut(done: int, total: int) -> None:
        os.truncate(file, file.stat().st_size - (total - done) // 2)

    with pytest.raises(WeightsError, match=r"model\.safetensors ended early"):
        load(empty(), tmp_path, PLAIN, dtype=torch.float32, device=CPU, progress=cut)


# ---- types -------------------------------------------------------------------------------------

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("chunk", [64 << 20, 16])
@pytest.mark.parametrize("wanted", FLOATS[1:])
@pytest.mark.parametrize("stored", FLOATS)
def test_conversions(
    stored: torch.dtype,
    wanted: torch.dtype,
    chunk: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weights, "CHUNK", chunk)  # 16 bytes: every tensor in several pieces
    content = tensors(dtype=stored)
    write(tmp_path, content)
    model = empty()
    load(model, tmp_path, PLAIN, dtype=wanted, device=CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    assert_holds(model, {name: tensor.to(wanted) for name, tensor in content.items()})


def test_the_type_most_bytes_have(tmp_path: Path) -> None:
    content = tensors(dtype=torch.bfloat16)
    content["block.linear.bias"] = content["block.linear.bias"].float()
    assert stored_dtype(write(tmp_path, content)) == torch.bfloat16


# ---- what is handed on row by row --------------------------------------------------------------


class Taker:
    """Takes the matrices of some names, and keeps what it was given."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.asked: list[tuple[str, torch.device]] = []
        self.taken: dict[str, list[tuple[int, Tensor]]] = {}
        self.memory: set[int] = set()

    def __call__(self, name: str, device: torch.device) -> Callable[[int, Tensor], None] | None:
        self.asked.append((name, device))
        if name not in self.names:
            return None
        pieces = self.taken.setdefault(name, [])

        def take(start: int, rows: Tensor) -> None:
            self.memory.add(rows.data_ptr())
            pieces.append((start, rows.clone()))

        return take


@pytest.mark.parametrize("wanted", FLOATS[1:])
@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize(("chunk", "rows"), [(4 << 20, 5), (50, 0), (8, 1)])
def test_rows_are_handed_on(
    stored: torch.dtype,
    wanted: torch.dtype,
    chunk: int,
    rows: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weights, "CHUNK", chunk)
    content, place, model = tensors(dtype=stored), Taker("head.weight"), empty()
    load(model, write(tmp_path, content), PLAIN, dtype=wanted, device=CPU, place=place)
    assert sorted(place.asked) == [(name, CPU) for name in sorted(content)]
    pieces = place.taken.pop("head.weight")
    most = rows or max(1, chunk // (3 * stored.itemsize))
    assert [start for start, _ in pieces] == list(range(0, 5, most))
    assert torch.equal(torch.cat([rows for _, rows in pieces]), content["head.weight"].to(wanted))
    assert all(rows.dtype == wanted for _, rows in pieces)
    assert stored != wanted or len(place.memory) == 1
    assert model.head.weight.is_meta  # whoever takes rows puts something in the place
    assert torch.equal(model.embed.weight, content["embed.weight"].to(wanted))


def test_a_tied_parameter_is_not_handed_on(tmp_path: Path) -> None:
    content = tensors()
    del content["head.weight"]
    place, model = Taker("embed.weight", "head.weight"), empty(tied=True)
    load(model, write(tmp_path, content), PLAIN, dtype=torch.float32, device=CPU, place=place)
    assert sorted(name for name, _ in place.asked) == [n for n in sorted(content) if n[0] == "b"]
    assert not place.taken
    assert torch.equal(model.head.weight, content["embed.weight"])


def test_rows_come_on_their_device(tmp_path: Path) -> None:
    content, place = tensors(), Taker("head.weight")
    where = torch.device("meta")
    load(empty(), write(tmp_path, content), PLAIN, dtype=torch.half, device=where, place=place)
    assert {device for _, device in place.asked} == {where}
    assert all(rows.is_meta for _, rows in place.taken["head.weight"])


def test_a_file_that_is_cut_while_rows_are_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "CHUNK", 12)  # a row
    file = write(tmp_path, tensors()) / "model.safetensors"
    taken = []

    def take(start: int, rows: Tensor) -> None:
        taken.append(start)
        os.truncate(file, file.stat().st_size - 80)

    how = {"dtype": torch.float32, "device": CPU}
    place = {"head.weight": take}.get
    with pytest.raises(WeightsError, match=r"model\.safetensors ended early"):
        load(empty(), tmp_path, PLAIN, place=lambda name, _: place(name), **how)
    assert taken


# ---- writing -----------------------------------------------------------------------------------


def model_of(content: Mapping[str, Tensor], tied: bool = False) -> Net:
    model = Net(tied)
    model.load_state_dict(content, strict=not tied)
    return model


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_file(tmp_path: Path) -> None:
    content = tensors()
    save(model_of(content), tmp_path)
    assert files(tmp_path) == ["model.safetensors"]
    assert_holds(read(tmp_path), content)


def test_several_files(tmp_path: Path) -> None:
    content = tensors()
    save(model_of(content), tmp_path, shard=40)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in content.values())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-0000{i}-of-0000{len(shards)}.safetensors" for i in (1, 2, 3)]
    assert files(tmp_path) == sorted([INDEX, *shards])
    for shard in shards:
        held = load_file(tmp_path / shard)
        assert sum(tensor.nbytes for tensor in held.values()) <= 40 or len(held) == 1
    assert_holds(read(tmp_path), content)


def test_a_tied_head_is_written_once(tmp_path: Path) -> None:
    content = tensors()
    del content["head.weight"]
    save(model_of(content, tied=True), tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == content.keys()
    assert_holds(read(tmp_path, empty(tied=True)), content)


@pytest.mark.parametrize("shards", [(40, 1 << 20), (1 << 20, 40), (40, 60)])
def test_older_weights_in_the_folder_are_replaced(tmp_path: Path, shards: tuple[int, int]) -> None:
    (tmp_path / "adapter.safetensors").write_bytes(b"not ours")
    save(model_of(tensors(1)), tmp_path, shard=shards[0])
    content = tensors(2)
    save(model_of(content), tmp_path, shard=shards[1])
    (tmp_path / "adapter.safetensors").unlink()  # it was left alone
    assert_holds(read(tmp_path), content)
    assert (tmp_path / "model.safetensors").exists() == (shards[1] > 1000)
