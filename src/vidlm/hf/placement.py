"""Where a model's weights lie: `device_map` and `max_memory` of `from_pretrained`.

All but the decoder lies on one device, the *main* one: tokens go in and logits come out there.
Decoder layers may lie on several GPUs; those that no GPU has room for lie on the CPU, and each is
copied to the main GPU for its turn. A map of names may also put the last norm and the head
elsewhere. What is free now is asked in one place, `_room`; all else is arithmetic.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vidlm.engine.memory import free_bytes
from vidlm.errors import InvalidArgument
from vidlm.models.base import VideoModel
from vidlm.nn.placed import place
from vidlm.weights import Renames

CPU = torch.device("cpu")
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
ALLOWED = (
    "'auto', 'cpu', 'cuda', 'cuda:0', 'mps' (on a Mac), 'balanced', 'balanced_low_0', "
    "'sequential', a torch.device, or a dict of devices by names of parts, such as {'': 'cuda:0'}"
)
IN_MEMORY = "0, 1 and so on for GPUs, and 'cpu'"
UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}
ROOM = 0.9  # of a GPU's free memory, for weights: keys, values and what layers compute need theirs


@dataclass(frozen=True)
class DeviceMap:
    """`device_map` and `max_memory`, understood.

    how   a strategy, or devices by the beginnings of parts' names, "" for all
    room  bytes of each device that weights may take; None: most of what is free
    """

    how: str | Mapping[str, torch.device] = field(default_factory=lambda: {"": CPU})
    room: Mapping[torch.device, int] | None = None

    @property
    def devices(self) -> list[torch.device]:
        """Those that layers may run on."""
        named = _gpus(self.room) or [CPU] if isinstance(self.how, str) else self.how.values()
        gpus = [device for device in dict.fromkeys(named) if device != CPU]
        return gpus or [CPU]


@dataclass(frozen=True)
class Placement:
    """The main device, and of each part whose weights are kept elsewhere where that is."""

    main: torch.device
    elsewhere: Mapping[str, torch.device] = field(default_factory=dict)

    def device_of(self, parameter: str) -> torch.device:
        """Where a parameter is kept."""
        for part, device in self.elsewhere.items():
            if parameter.startswith(f"{part}."):
                return device
        return self.main

    @property
    def waiting(self) -> list[str]:
        """The parts whose weights are on the CPU and come to the main GPU for their turn."""
        return [part for part, device in self.elsewhere.items() if self.runs_on(part) != device]

    def runs_on(self, part: str) -> torch.device:
        """Where a part computes."""
        device = self.elsewhere.get(part, self.main)
        return self.main if device == CPU else device

    def apply(self, model: VideoModel) -> None:
        """Let a loaded model's parts run where they are to. Nothing is to be done where all is on
        one device."""
        if not self.elsewhere:
            return
        parts = _Parts(model)
        for name in parts.layers:
            place(model.get_submodule(name), self.runs_on(name))
        place(model.get_submodule(parts.norm), self.runs_on(parts.norm), back=self.main)
        if parts.head in self.elsewhere:
            place(model.head, self.runs_on(parts.head), back=self.main)


def read_device_map(device_map: Any, max_memory: Any = None) -> DeviceMap:
    """Understand both keywords; raises InvalidArgument where a value is not allowed or a device is
    not there."""
    if max_memory is not None and (not isinstance(device_map, str) or device_map not in STRATEGIES):
        raise InvalidArgument(
            f"max_memory with device_map={device_map!r}; it goes with {', '.join(STRATEGIES)}"
        )
    if device_map is None:
        return DeviceMap()
    if isinstance(device_map, str) and device_map in STRATEGIES:
        return DeviceMap(device_map, None if max_memory is None else _read_room(max_memory))
    if isinstance(device_map, Mapping) and device_map:
        named = f"device_map={dict(device_map)!r}"
        return DeviceMap({str(k): _device(v, named) for k, v in device_map.items()})
    return DeviceMap({"": _device(device_map, f"device_map={device_map!r}")})


def plan_placement(
    model: VideoModel, wanted: DeviceMap, dtype: torch.dtype, renames: Renames | None = None
) -> Placement:
    """Where the weights of a model, which may be on the meta device, are to lie in `dtype`, codes
    and scales of packed ones as they are.

    `renames` tells how else a map of names may spell them. Raises InvalidArgument where they do not
    fit, or a map leaves parts out or divides what cannot be divided.
    """
    parts = _Parts(model)
    if not isinstance(wanted.how, str):
        return _as_told(model, parts, wanted.how, renames or Renames())
    room = _room() if wanted.room is None else wanted.room
    sizes = {n: p.numel() * dtype.itemsize for n, p in model.named_parameters()}
    sizes |= {n: buffer.nbytes for n, buffer in model.named_buffers()}
    layers = [_sum_below(sizes, f"{name}.") for name in parts.layers]
    rest = sum(sizes.values()) - sum(layers)
    gpus = _gpus(room)
    if not gpus:
        if wanted.room is not None:
            _check_cpu(rest + sum(layers), room)
        return Placement(CPU)
    found = spread(layers, rest, [room[gpu] for gpu in gpus], wanted.how)
    left = sum(size for size, number in zip(layers, found, strict=True) if number is None)
    if left:
        _check_cpu(left, room)
    devices = [CPU if number is None else gpus[number] for number in found]
    named = zip(parts.layers, devices, strict=True)
    return Placement(gpus[0], {name: device for name, device in named if device != gpus[0]})


# ---- which layer goes where ----------------------------------------------------------------------


def spread(layers: Sequence[int], rest: int, room: Sequence[int], how: str) -> list[int | None]:
    """The number of each layer's device, None for the CPU. All in bytes: the layers' sizes, that of
    the rest of the model, which is on device 0, and what each device has room for.

    Layers stay in order, so that tokens go from device to device once. Raises InvalidArgument where
    device 0 has no room for the rest and a layer's turn.
    """
    limits = [room[0] - rest, *room[1:]]
    if limits[0] >= 0 and len(_filled(layers, limits)) == len(layers):
        return list(_divided(layers, rest, limits, how))
    limits[0] -= max(layers)  # where those that wait on the CPU have their turn
    if limits[0] < 0:
        raise InvalidArgument(
            f"the first GPU has room for {_size(room[0])}, and the parts that must be there take "
            f"{_size(rest)}, a layer beside them {_size(max(layers))}; free some of its memory, "
            "give it more in max_memory, or load with device_map='cpu'"
        )
    found = _filled(layers, limits)
    return [*found, *[None] * (len(layers) - len(found))]


def _divided(layers: Sequence[int], rest: int, limits: Sequence[int], how: str) -> list[int]:
    """Layers that have room as a strategy divides them."""
    alone = limits[:1]
    if how == "auto" and len(_filled(layers, alone)) == len(layers):
        return _filled(layers, alone)  # a second GPU would only make tokens travel
    if how == "sequential" or len(limits) == 1:
        return _filled(layers, limits)
    first, others = limits[0], limits[1:]
    if how == "balanced_low_0":
        first = _least(layers, lambda most: [min(most, limits[0]), *others], first)
        return _even(layers, lambda most: [first, *(min(most, x) for x in others)], max(others))

    def capped(most: int) -> list[int]:
        return [min(most - rest, first), *(min(most, x) for x in others)]

    return _even(layers, capped, max(first + rest, *others))


def _even(layers: Sequence[int], capped: Callable[[int], list[int]], most: int) -> list[int]:
    """As little as possible on the device with the most."""
    return _filled(layers, capped(_least(layers, capped, most)))


def _least(layers: Sequence[int], limits: Callable[[int], list[int]], most: int) -> int:
    """The smallest number up to `most` within whose limits all layers have room."""
    return bisect_left(
        range(most), True, key=lambda n: len(_filled(layers, limits(n))) == len(layers)
    )


def _filled(layers: Sequence[int], limits: Sequence[int]) -> list[int]:
    """The device of each of the first layers, one device after the other filled up to its limit."""
    found: list[int] = []
    for device, left in enumerate(limits):
        while len(found) < len(layers) and layers[len(found)] <= left:
            left -= layers[len(found)]
            found.append(device)
    return found


def _check_cpu(needed: int, room: Mapping[torch.device, int]) -> None:
    if needed > room.get(CPU, 0):
        raise InvalidArgument(
            f"weights of {_size(needed)} are left for the CPU, which has room for "
            f"{_size(room.get(CPU, 0))}; give more in max_memory={{'cpu': ...}}, load in fewer "
            "bits, or take a smaller model"
        )


# ---- a map of names ------------------------------------------------------------------------------


class _Parts:
    """The names of the parts of a model that may lie on a device of their own."""

    def __init__(self, model: VideoModel) -> None:
        names = {id(module): name for name, module in model.named_modules()}
        decoder = model.decoder
        self.layers = [names[id(layer)] for layer in decoder.layers]
        head: nn.Module | None = getattr(model, "head", None)  # a body has none
        self.norm, self.head = names[id(decoder.norm)], "" if head is None else names[id(head)]


def _as_told(
    model: VideoModel, parts: _Parts, told: Mapping[str, torch.device], renames: Renames
) -> Placement:
    """The placement that a map of names describes."""
    where = _by_parameter(model, told, renames)
    movable = [*parts.layers, parts.norm, *filter(None, [parts.head])]
    beside = {n: d for n, d in where.items() if not n.startswith(tuple(f"{p}." for p in movable))}
    mains = dict.fromkeys(beside.values())
    if len(mains) > 1:
        shown = ", ".join(f"{_first(beside, device)} on {device}" for device in mains)
        raise InvalidArgument(
            f"device_map divides what must be on one device: {shown}; layers of the decoder, its "
            "last norm and the head may be elsewhere"
        )
    (main,) = mains
    found = {}
    for part in movable:  # but for a tied head, which has no tensor of its own
        own = {n: d for n, d in where.items() if n.startswith(f"{part}.")}
        devices = list(dict.fromkeys(own.values()))
        if len(devices) > 1:
            shown = ", ".join(f"{_first(own, device)} on {device}" for device in devices)
            raise InvalidArgument(f"device_map divides {part}: {shown}; give it one device")
        found[part] = devices[0] if devices else main
    return Placement(main, {part: device for part, device in found.items() if device != main})


def _by_parameter(
    model: VideoModel, told: Mapping[str, torch.device], renames: Renames
) -> dict[str, torch.device]:
    """The device of every parameter; the longest name in the map that fits one counts."""
    names: dict[str, int] = {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}
    where: dict[str, torch.device] = {}
    for key in sorted(told, key=len):
        mine = _below(names, key, renames)
        if not mine and not key.endswith("rotary_emb"):  # others' module without weights
            tops = dict.fromkeys(re.sub(r"^((model\.)?[^.]*).*", r"\1", name) for name in names)
            raise InvalidArgument(
                f"device_map names {key!r}, which is no part of the model; its parts begin with "
                f"{', '.join(tops)}, and '' stands for all"
            )
        where.update(dict.fromkeys(mine, told[key]))
    missing = [name for name in names if name not in where]
    if missing:
        raise InvalidArgument(
            f"device_map says nothing of {len(missing)} tensors, such as {missing[0]}; add a "
            "device for the rest under ''"
        )
    tied: dict[int, str] = {}
    for name, id_ in names.items():
        twin = tied.setdefault(id_, name)
        if where[twin] != where[name]:
            raise InvalidArgument(
                f"device_map puts {twin} on {where[twin]} and {name} on {where[name]}, and they "
                "are the same tensor; give both the same device"
            )
    return {name: where[name] for name in tied.values()}


def _below(names: Mapping[str, int], key: str, renames: Renames) -> list[str]:
    """The parameters under a name, ours or that of another layout."""
    mine = [name for name in names if not key or name == key or name.startswith(f"{key}.")]
    if mine:
        return mine
    published = {name: renames.published(name) for name in names}
    mine = [n for n, other in published.items() if other == key or other.startswith(f"{key}.")]
    if mine:
        return mine
    prefix, whole = renames.name(f"{key}."), renames.name(key)
    return [name for name in names if name == whole or (prefix and name.startswith(prefix))]


def _first(where: Mapping[str, torch.device], device: torch.device) -> str:
    return next(name for name, own in where.items() if own == device)


def _sum_below(sizes: Mapping[str, int], prefix: str) -> int:
    return sum(size for name, size in sizes.items() if name.startswith(prefix))


# ---- devices and sizes ---------------------------------------------------------------------------


def _room() -> dict[torch.device, int]:
    """What may be taken of each device now."""
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return {**{gpu: int(ROOM * free_bytes(gpu)) for gpu in gpus}, CPU: free_bytes(CPU)}


def _gpus(room: Mapping[torch.device, int] | None) -> list[torch.device]:
    """In order; those that are there, where no room is given."""
    if room is None:
        return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return sorted((d for d in room if d != CPU), key=lambda device: device.index)


def _read_room(given: Any) -> dict[torch.device, int]:
    if not isinstance(given, Mapping):
        raise InvalidArgument(
            f"max_memory={given!r}; give bytes by device, such as {{0: '20GiB', 'cpu': '60GiB'}}"
        )
    named, room = f"max_memory={dict(given)!r}", {}
    for key, value in given.items():
        device = _device(key, named, IN_MEMORY)
        if device.type not in ("cpu", "cuda"):
            raise InvalidArgument(f"{named}; allowed: {IN_MEMORY}")
        if device in room:
            raise InvalidArgument(f"{named} names {device} twice; give each device one size")
        room[device] = _read_size(value)
    return room


def _read_size(given: Any) -> int:
    """Bytes of an int, or of text such as "20GiB" or "512 MB"."""
    if isinstance(given, int) and not isinstance(given, bool) and given >= 0:
        return given
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?)B?\s*", str(given).upper())
    if not isinstance(given, str) or found is None or found[2] not in UNITS:
        raise InvalidArgument(
            f"{given!r} in max_memory; give a number of bytes, or text such as '20GiB' or '512MB'"
        )
    return int(float(found[1]) * UNITS[found[2]])


def _device(given: Any, named: str, allowed: str = ALLOWED) -> torch.device:
    """A device that is there, of a keyword; an int is that GPU."""
    if given == "disk":
        raise InvalidArgument(f"{named}; weights are kept on GPUs and the CPU, not on disk")
    try:
        device = torch.device("cuda", given) if isinstance(given, int) else torch.device(given)
    except (RuntimeError, TypeError) as error:
        raise InvalidArgument(f"{named}; allowed: {allowed}") from error
    if device.type == "cpu":
        return CPU
    if device.type != "cuda":
        return _other_device(device, named, allowed)
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        seen = f"{count} of them, from cuda:0" if count else "no GPU"
        raise InvalidArgument(f"device {str(device)!r}, but torch sees {seen}; use 'cpu' or 'auto'")
    if device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _other_device(device: torch.device, named: str, allowed: str) -> torch.device:
    """An accelerator that this torch can use, such as a Mac's GPU: plain torch runs on it.

    Raises InvalidArgument for one that is not there, and for "meta", which holds no numbers.
    """
    backend = getattr(torch.backends, device.type, None)
    module = backend if hasattr(backend, "is_available") else getattr(torch, device.type, None)
    available = getattr(module, "is_available", None)
    if available is None or not available():
        raise InvalidArgument(
            f"{named}; allowed: {allowed}; and this torch has no {device.type!r} device here"
        )
    # Tensors name a device with its number, and are compared by it.
    return torch.device(device.type, device.index or 0)


def _size(bytes_: int) -> str:
    return f"{bytes_ / 1e9:.2f} GB" if bytes_ >= 1e8 else f"{bytes_ / 1e6:.1f} MB"
