"""Nothing in a file of a stranger makes the reader open another file or an address."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

import clips
from container_files import SAMPLE_ENTRY, TRACK_ENTRY, box, boxes, muxed, with_element
from vidlm.errors import MediaError, VidlmError
from vidlm.media import load_image, load_video
from web import Web, serve

SECRET = 0xBEEF  # the number in every frame of the file that must not be read
FORMATS = {
    "m3u8": "#EXTM3U\n#EXT-X-VERSION:7\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{}\n#EXT-X-ENDLIST\n",
    "m3u8 with a map": "#EXTM3U\n#EXT-X-VERSION:7\n#EXT-X-TARGETDURATION:4\n"
    '#EXT-X-MAP:URI="{0}"\n#EXTINF:4,\n{0}\n#EXT-X-ENDLIST\n',
    "m3u8 with a key": "#EXTM3U\n#EXT-X-TARGETDURATION:4\n"
    '#EXT-X-KEY:METHOD=AES-128,URI="{0}"\n#EXTINF:4,\n{0}\n#EXT-X-ENDLIST\n',
    "master m3u8": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{}\n",
    "ffconcat": "ffconcat version 1.0\nfile '{}'\n",
    "concat": "file '{}'\n",
    "mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT1S" minBufferTime="PT1S"><Period><AdaptationSet '
    'mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>{}</BaseURL>'
    "</Representation></AdaptationSet></Period></MPD>",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
    "m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\na=control:{}\n",
    "asx": '<asx version="3.0"><entry><ref href="{}"/></entry></asx>',
    "pls": "[playlist]\nFile1={}\nNumberOfEntries=1\n",
    "smil": '<smil><body><video src="{}"/></body></smil>',
    "svg": '<svg xmlns="http://www.w3.org/2000/svg"><image href="{}"/></svg>',
    "rtsp text": "RTSPtext\n{}\n",
    "imf": '<?xml version="1.0"?><CompositionPlaylist xmlns='
    '"http://www.smpte-ra.org/schemas/2067-3/2016"><Id>{}</Id></CompositionPlaylist>',
    "avs": 'FFmpegSource2("{}")\n',
    "vpy": "import vapoursynth\nopen('{}')\n",
    "ffmetadata": ";FFMETADATA1\ntitle={}\n",
}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Web]:
    with serve() as server:
        yield server


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("secret") / "target.ts"
    frames = clips.np.repeat(clips.picture(SECRET)[None], 6, 0)
    path.write_bytes(clips.encode(frames, container="mpegts"))
    assert clips.numbers(load_video(path).frames) == [SECRET] * 6
    return path


def links(target: Path, server: Web) -> list[str]:
    """Ways to name a file or an address that FFmpeg's protocols know."""
    return [
        str(target),
        target.name,
        target.as_uri(),
        f"file:{target}",
        f"subfile,,start,0,end,0,,:{target}",
        f"concat:{target}|{target}",
        f"async:{target}",
        f"cache:{target}",
        f"crypto:{target}",
        f"hls+{server.url}/ok",
        f"{server.url}/ok",
        f"tcp://{server.url.removeprefix('http://')}",
        "data:video/mp2t;base64,AAAA",
    ]


@pytest.mark.parametrize("kind", FORMATS)
def test_lists_of_other_files_are_not_followed(kind: str, target: Path, server: Web) -> None:
    server.forget()
    for link in links(target, server):
        data = FORMATS[kind].replace("{0}", link).replace("{}", link).encode()
        beside = target.parent / "list.mp4"  # a relative name would lead to it from here
        beside.write_bytes(data)
        for source in (data, beside, b"\xef\xbb\xbf" + data, b"\n\n" + data):
            with pytest.raises(MediaError, match=r"not a video|not followed"):
                load_video(source)
        with pytest.raises(MediaError):
            load_image(data)
    assert not server.seen


def referring(data: bytes, entry: bytes) -> bytes:
    """A QuickTime movie whose media are said to lie elsewhere; its own are wiped."""
    texts = []
    for kind, text in boxes(data):
        if kind == b"mdat":
            text = text[:8] + bytes(len(text) - 8)
        texts.append(replaced(text, entry) if kind == b"moov" else text)
    return b"".join(texts)


def replaced(text: bytes, entry: bytes) -> bytes:
    """Boxes down to `dref`, which gets one entry."""
    kind = text[4:8]
    if kind == b"dref":
        return box(b"dref", bytes(4), struct.pack(">I", 1), entry)
    if kind not in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
        return text
    return box(kind, *(replaced(each, entry) for _, each in boxes(text[8:])))


def alias(path: Path) -> bytes:
    """A Macintosh alias record, version 2, that names a file by its whole path."""
    name, folder = path.name.encode(), path.parent.name.encode()
    record = bytes(4) + struct.pack(">HHH", 150, 2, 0)
    record += bytes([4]) + b"disk".ljust(27, b"\0") + bytes(4) + b"H+" + bytes(2) + bytes(4)
    record += bytes([len(name)]) + name[:63].ljust(63, b"\0") + bytes(16)
    record += struct.pack(">hh", 1, 1) + bytes(16)
    for kind, text in ((2, str(path).encode()), (0, folder), (18, str(path).encode())):
        record += struct.pack(">hH", kind, len(text)) + text + bytes(len(text) % 2)
    record += struct.pack(">hH", -1, 0)
    return box(b"alis", bytes(4), record)


@pytest.mark.parametrize("container", ["mov", "mp4"])
def test_references_of_a_movie_are_not_followed(
    container: str, target: Path, server: Web, tmp_path: Path
) -> None:
    server.forget()
    whole = muxed(clips.pictures(6), container, "mpeg4", options={"g": "1"})
    other = muxed(clips.np.repeat(clips.picture(SECRET)[None], 6, 0), container, "mpeg4")
    (tmp_path / "other.mov").write_bytes(other)
    entries = [alias(tmp_path / "other.mov")]
    for link in links(tmp_path / "other.mov", server):
        entries += [box(b"url ", bytes(4), link.encode() + b"\0")]
        entries += [box(b"urn ", bytes(4), b"name\0" + link.encode() + b"\0")]
    for entry in entries:
        data = referring(whole, entry)
        assert entry in data
        path = tmp_path / "movie.mov"
        path.write_bytes(data)
        for source in (data, path):
            assert_blind(source)
    assert not server.seen
    assert SAMPLE_ENTRY[0] == b"moov"


def assert_blind(source: bytes | Path) -> None:
    """Whatever comes of it, it is not what the other file shows."""
    try:
        video = load_video(source)
    except VidlmError as error:
        assert isinstance(error, MediaError)  # noqa: PT017
    else:
        assert SECRET not in clips.numbers(video.frames)


def test_references_of_a_matroska_file_are_not_followed(target: Path, server: Web) -> None:
    """Segments that go on in other files, and the path of a codec to download."""
    server.forget()
    segment, info = 0x18538067, 0x1549A966
    name, address = str(target).encode(), f"{server.url}/ok".encode()
    for id in (0x3C83AB, 0x3E83BB, 0x7384):  # PrevFilename, NextFilename, SegmentFilename
        assert_own(with_named(segment, info, id, name))
    for id in (0x3B4040, 0x26B240):  # CodecInfoURL, CodecDownloadURL
        assert_own(with_named(segment, 0x1654AE6B, id, address, TRACK_ENTRY))
    assert not server.seen


def with_named(segment: int, part: int, id: int, text: bytes, *inside: int) -> bytes:
    from container_files import element

    data = muxed(clips.pictures(6), "matroska", "mpeg4")
    return with_element(data, (segment, part, *inside), element(id, text))


def assert_own(data: bytes) -> None:
    clips.check(load_video(data), range(6))


def test_a_name_with_a_pattern_is_one_file(tmp_path: Path, monkeypatch) -> None:
    """FFmpeg's own image2 would read frame_1.png, frame_2.png for it."""
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        clips.np.save(tmp_path / f"frame_{number}.npy", clips.picture(number))
    for name in ("frame_%d.png", "glob:*.png", "concat:a.mp4|b.mp4", "pipe:0", "fd:", "/dev/fd/99"):
        with pytest.raises(MediaError, match=r"no such file|matches no file"):
            load_video(name)
