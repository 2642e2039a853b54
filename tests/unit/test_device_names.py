"""Names of devices: what torch cannot use here is refused, in Python and on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vidlm
from vidlm.cli import application
from vidlm.errors import InvalidArgument
from vidlm.hf.placement import read_device_map

ABSENT = ("mps", "mps:0", "xpu", "hpu", "mtia", "meta", "vulkan", "xla", "privateuseone", "ipu")
UNKNOWN = ("gpu", "tpu", "cuda:x", "", "cpu,cuda", "npu0")


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize("name", [*ABSENT, *UNKNOWN])
def test_what_is_not_there_is_refused_with_what_is_allowed(name: str) -> None:
    with pytest.raises(InvalidArgument, match=r"device_map='.*'; allowed: 'auto', 'cpu', 'cuda'"):
        vidlm.load("demo", device=name)
    if name in ABSENT:
        with pytest.raises(InvalidArgument, match=f"this torch has no '{name[:3]}"):
            read_device_map(torch.device(name))
        with pytest.raises(InvalidArgument, match="allowed"):
            read_device_map({"": "cpu", "language_model": name})


@pytest.mark.parametrize("name", ABSENT[:2])
@pytest.mark.parametrize("command", ["ask", "index", "info", "bench latency"])
def test_the_command_line_refuses_them_too(
    command: str, name: str, capsys: pytest.CaptureFixture[str], clips_dir: Path
) -> None:
    clip = str(clips_dir / "imageio_realshort.mp4")
    words = {"ask": [clip, "What?", "--model", "demo"], "index": [clip, "--model", "demo"]}
    with pytest.raises(SystemExit) as ended:
        application()([*command.split(), *words.get(command, ["demo"]), "--device", name])
    assert ended.value.code == 2
    assert f"vidlm: --device '{name}'; allowed: 'auto', 'cpu'" in capsys.readouterr().err


def test_a_macs_gpu_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for name in ("mps", "mps:0", torch.device("mps")):
        assert read_device_map(name).devices == [torch.device("mps:0")]
