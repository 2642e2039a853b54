"""hub.py: names to folders, JSON as the hub has it, and which file holds which tensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import save_file

from vidlm import hub
from vidlm.errors import (
    HubUnreachable,
    ModelError,
    ModelNotFound,
    UnsupportedModel,
    WeightsError,
)

# ---- resolve ---------------------------------------------------------------------------------


def test_a_folder_is_itself_and_needs_no_hub_library(tmp_path: Path) -> None:
    code = (
        "import sys; from vidlm.hub import resolve; print(resolve(sys.argv[1])); "
        "print([m for m in ('huggingface_hub', 'torch') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines() == [str(tmp_path), "[]"]


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/model") == tmp_path / "model"


@pytest.mark.parametrize(
    "name", ["./gone", "/no/such/folder", "a/b/c", "gone", "", "C:\\models\\x", "~/gone", "a/.b"]
)
def test_neither_folder_nor_hub_id(name: str, no_download: None) -> None:
    with pytest.raises(ModelNotFound, match="no such folder") as caught:
        hub.resolve(name)
    assert repr(name) in str(caught.value)
    assert "owner/name" in str(caught.value)
    assert "--model demo" in str(caught.value)


def test_a_file_is_not_a_model(tmp_path: Path, no_download: None) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelNotFound, match="pass the folder"):
        hub.resolve(tmp_path / "model.safetensors")


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)


def failing(error: Exception) -> Callable[..., str]:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise error

    return snapshot_download


def http(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind(f"{status} Client Error\nmore lines", response=response)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


TRANSPORT: Any = errors.HfHubHTTPError.__bases__[0]
FAILURES = [
    (http(errors.RepositoryNotFoundError, 404), ModelNotFound, "HF_TOKEN"),
    (http(errors.RepositoryNotFoundError, 401), ModelNotFound, "no repository"),
    (http(errors.GatedRepoError, 403), ModelError, "accept the licence.*HF_TOKEN"),
    (http(errors.HfHubHTTPError, 401), ModelError, "HF_TOKEN"),
    (
        caused(errors.LocalEntryNotFoundError("x"), http(errors.HfHubHTTPError, 403)),
        ModelError,
        "HF_TOKEN",
    ),
    (errors.LocalTokenNotFoundError("no token"), ModelError, "no token.*HF_TOKEN"),
    (http(errors.RevisionNotFoundError, 404), ModelNotFound, "no revision 'v9'"),
    (errors.HFValidationError("bad id"), ModelNotFound, "valid hub id"),
    (http(errors.HfHubHTTPError, 503), HubUnreachable, "503 Client Error\\)"),
    (errors.LocalEntryNotFoundError("not on disk"), HubUnreachable, "not on disk"),
    (errors.IncompleteSnapshotError("2 missing", "x"), HubUnreachable, "2 missing"),
    (errors.OfflineModeIsEnabled("offline"), HubUnreachable, "unset HF_HUB_OFFLINE"),
    (http(errors.HfHubHTTPError, 404), ModelNotFound, "no repository on http"),
    (http(errors.RemoteEntryNotFoundError, 404), HubUnreachable, "404 Client Error"),
    (TRANSPORT("proxy"), HubUnreachable, "proxy"),
    (TimeoutError(110, "timed out"), HubUnreachable, "timed out"),
    (RuntimeError("transfer broke"), HubUnreachable, "transfer broke"),
    (OSError(28, "No space left on device"), ModelError, "No space left.*HF_HOME"),
]


@pytest.mark.parametrize(("error", "kind", "message"), FAILURES)
def test_hub_errors_become_ours(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[ModelError], message: str
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(error))
    with pytest.raises(kind, match=message) as caught:
        hub.resolve("owner/name", revision="v9")
    assert type(caught.value) is kind
    assert caught.value.__cause__ is error
    assert "owner/name" in str(caught.value)
    if kind is HubUnreachable:
        assert str(caught.value).endswith("--model demo")


def test_a_bug_is_not_called_a_network_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(KeyError("oops")))
    with pytest.raises(KeyError):
        hub.resolve("owner/name")


def test_offline_and_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachable, match=r"--model demo$"):
        hub.resolve("owner/name", cache_dir=tmp_path)


def test_a_cached_snapshot_needs_no_network(tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    (snapshot / "config.json").write_text("{}")
    found = hub.resolve("owner/name", cache_dir=tmp_path, local_files_only=True)
    assert found == snapshot
    assert hub.read_config(found) == {}


def test_what_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **kwargs: Any) -> str:
        asked.update(kwargs, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.resolve("o/n", revision="r", cache_dir="c", token="t") == tmp_path
    assert (asked["name"], asked["revision"], asked["cache_dir"]) == ("o/n", "r", Path("c"))
    assert (asked["token"], asked["local_files_only"]) == ("t", False)
    wanted = [
        "config.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "tokenizer.model",
        "chat_template.jinja",
        "merges.txt",
    ]
    refused = [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "training_args.bin",
        "consolidated.00.pth",
        "model.pt",
        "modeling_custom.py",
        "onnx/config.json",
        "original/model.safetensors",
    ]
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects([*wanted, *refused], **patterns)) == wanted


# ---- JSON files ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw", [b'{\r\n  "a": "\xc3\xa9"\r\n}\r\n', b'\xef\xbb\xbf{"a": "\xc3\xa9"}']
)
def test_json_with_crlf_or_byte_order_mark(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "x.json").write_bytes(raw)
    assert hub.read_json(tmp_path / "x.json") == {"a": "é"}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{\n "a": 1\n }",\n', "line 3, column 3"),
        (b"[1]", "holds a JSON list"),
        (b'{"a": "\xff"}', "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"", "line 1"),
    ],
)
def test_bad_json(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(raw)
    with pytest.raises(ModelError, match=message) as caught:
        hub.read_json(tmp_path / "x.json")
    assert "x.json" in str(caught.value)


def test_missing_json(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"x\.json is missing"):
        hub.read_json(tmp_path / "x.json")
    with pytest.raises(ModelError, match=r"no config\.json"):
        hub.read_config(tmp_path)


@pytest.mark.parametrize("name", ["interleave", "next_video", "video_llava", "vl3"])
def test_configs_of_the_hub(shared: Path, name: str) -> None:
    assert "model_type" in hub.read_config(shared / "data" / "hub_like" / name)


# ---- which file holds which tensor -----------------------------------------------------------


def put(folder: Path, **files: str) -> Path:
    """Safetensors files by stem (`__` for `-`), each with the named tensors."""
    for stem, names in files.items():
        tensors = {name: np.zeros(2, np.float32) for name in names.split()}
        save_file(tensors, folder / f"{stem.replace('__', '-')}.safetensors")
    return folder


def index(folder: Path, weight_map: object) -> None:
    (folder / hub.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def names(found: dict[str, Path]) -> dict[str, str]:
    return {name: path.name for name, path in found.items()}


def test_sharded(tmp_path: Path) -> None:
    put(tmp_path, m__1="a b", m__2="c extra", stray="z")
    index(tmp_path, dict.fromkeys("ab", "m-1.safetensors") | {"c": "m-2.safetensors"})
    two = "m-2.safetensors"
    assert names(hub.weight_files(tmp_path)) == {
        "a": "m-1.safetensors",
        "b": "m-1.safetensors",
        "c": two,
        "extra": two,
    }


def test_a_single_file_wins_over_others(tmp_path: Path) -> None:
    put(tmp_path, model="a", other="b")
    assert names(hub.weight_files(tmp_path)) == {"a": "model.safetensors"}


def test_any_safetensors(tmp_path: Path) -> None:
    put(tmp_path, x="a", y="b")
    assert names(hub.weight_files(tmp_path)) == {"a": "x.safetensors", "b": "y.safetensors"}
    put(tmp_path, z="b")
    with pytest.raises(WeightsError, match=r"'b' is in y\.safetensors and in z\.safetensors"):
        hub.weight_files(tmp_path)


def test_the_index_decides_between_two_copies(tmp_path: Path) -> None:
    put(tmp_path, x="a b", y="b c")
    index(tmp_path, {"a": "x.safetensors", "b": "y.safetensors", "c": "y.safetensors"})
    assert names(hub.weight_files(tmp_path))["b"] == "y.safetensors"


def test_links_of_the_cache_are_inside(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    put(tmp_path / "blobs", x="a")
    (tmp_path / "snapshot" / "x.safetensors").symlink_to("../blobs/x.safetensors")
    index(tmp_path / "snapshot", {"a": "x.safetensors"})
    assert list(hub.weight_files(tmp_path / "snapshot")) == ["a"]


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "gone-2.safetensors", "b": "gone-1.safetensors"}, "lacks gone-1.*, gone-2"),
        ({"a": "x.safetensors", "b": "x.safetensors"}, "not in their file: b"),
        ({}, "no weight_map"),
        (["x.safetensors"], "no weight_map"),
        ({"a": "../x.safetensors"}, "inside the folder"),
        ({"a": "sub/../../x.safetensors"}, "inside the folder"),
        ({"a": "/etc/x.safetensors"}, "inside the folder"),
        ({"a": "..\\x.safetensors"}, "inside the folder"),
        ({"a": "C:x.safetensors"}, "inside the folder"),
        ({"a": "x.bin"}, "inside the folder"),
        ({"a": ""}, "inside the folder"),
        ({"a": 7}, "inside the folder"),
    ],
)
def test_bad_index(tmp_path: Path, weight_map: object, message: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    put(tmp_path, x="a")
    put(folder, x="a")
    index(folder, weight_map)
    with pytest.raises(WeightsError, match=message):
        hub.weight_files(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(UnsupportedModel, match=f"{name}.*refused; convert.*safetensors"):
        hub.weight_files(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(WeightsError, match=r"no \*\.safetensors file"):
            hub.weight_files(folder)
