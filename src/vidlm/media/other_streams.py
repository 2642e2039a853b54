"""The other streams of a container: how long its sound lasts, and pictures in a later stream."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from av.stream import Disposition

from vidlm.media.clip import Timeline
from vidlm.media.container import Reader
from vidlm.media.pyav import fraction

# Sound that outlasts the pictures by no more is of no consequence: encoders round it up.
_REST_SECONDS = 0.5


def sound_length(reader: Reader) -> float:
    """Seconds of sound, in containers that add up its samples; others go by time stamps."""
    if not {"mp4", "avi"} & set(reader.container.format.name.split(",")):
        return 0.0
    streams = reader.container.streams.audio
    lengths = ((s.duration or 0) * (fraction(s.time_base) or 0) for s in streams)
    return float(max(lengths, default=0.0))


def sound_end(reader: Reader, timeline: Timeline) -> float | None:
    """When the sound ends on the clip's clock, where the last picture stays on screen for it.

    None where it ends with the pictures. Headers announce what a file that was cut off no longer
    has, so the packets of sound after the last picture are looked at.
    """
    container = reader.container
    if not container.streams.audio or container.duration is None:
        return None
    usual = float(np.median(np.diff(timeline.pts))) if len(timeline.pts) > 1 else 0.0
    least = timeline.stop + max(_REST_SECONDS, usual)
    announced = ((container.start_time or 0) + container.duration) / 1_000_000
    if max(announced - timeline.start_time, sound_length(reader)) <= least:
        return None
    ends, lengths = [0.0], dict.fromkeys((s.index for s in container.streams.audio), 0.0)
    for packet in reader.others(container.streams.audio, timeline.start_time + timeline.stop):
        base = fraction(packet.time_base) or 0
        length = float((packet.duration or 0) * base)
        lengths[packet.stream_index] += length
        if packet.pts is not None:
            ends.append(float(packet.pts * base) + length - timeline.start_time)
    # A stamp that is hours off is no sound. Packets' lengths are rounded, to 21 of 21.3 ms, say.
    end = min(max(ends), timeline.stop + 1.1 * max(lengths.values()))
    return end if end > least else None


def later_pictures(reader: Reader) -> Iterator[str]:
    """Names a stream of pictures that begins where the one that was read has ended.

    A recorder that was started anew gives its stream another number (PID): of such an MPEG-TS a
    player shows the first part, as of any container the first stream.
    """
    container = reader.container
    others = [
        stream
        for stream in container.streams.video
        if stream is not reader.stream and not stream.disposition & Disposition.attached_pic
    ]
    if container.format.name != "mpegts" or not others:
        return
    first: dict[int, int] = {}
    last = 0
    start = (container.start_time or 0) / 1_000_000
    for packet in reader.others((reader.stream, *others), start):
        if packet.pos is None or packet.pos < 0:
            continue
        if packet.stream_index == reader.stream.index:
            last = max(last, packet.pos)
        else:
            first.setdefault(packet.stream_index, packet.pos)
    late = [stream for stream in others if first.get(stream.index, 0) > last]
    if late:
        numbers = ", ".join(f"{stream.id:#x}" for stream in late)
        yield (
            f"the pictures go on in another stream ({numbers} after {reader.stream.id:#x}), which "
            "is not read; make one stream of them: ffmpeg -i INPUT -map 0:v:1 second.mp4"
        )
