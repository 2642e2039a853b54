"""nn/linear.py: wide layers in parts give what they give as a whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from vidlm import native
from vidlm.nn import linear
from vidlm.nn.decoder import MLP, DecoderConfig
from vidlm.quant.packing import pack, packings

WIDE, ROWS, MOST = 96, 150, 40  # 150 rows of which 40 may be computed together: four parts


@pytest.fixture(autouse=True)
def without_gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(linear, "KEPT", 4 * WIDE * MOST)
    with torch.no_grad():
        yield


def mlp(kind: str | None = None) -> MLP:
    config = {
        "model_type": "qwen2",
        "vocab_size": 50,
        "hidden_size": 64,
        "intermediate_size": WIDE,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    made = MLP(DecoderConfig.from_dict(config))
    if kind is not None:
        for name, layer in list(made.named_children()):
            setattr(made, name, pack(layer.weight, packings()[kind]))
    return made


def rows() -> Tensor:
    return torch.randn(ROWS, 64, generator=torch.Generator().manual_seed(1))


def whole(layers: MLP, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(linear, "KEPT", 1 << 30)
        return layers(x)


def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each product with a matrix, from now on."""
    counts: list[int] = []
    real = nn.functional.linear

    def product(x: Tensor, *given: Tensor) -> Tensor:
        counts.append(len(x))
        return real(x, *given)

    monkeypatch.setattr(nn.functional, "linear", product)
    return counts


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_parts_give_the_whole(kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, x = mlp(kind), rows()
    expected = whole(layers, x, monkeypatch)
    counts = seen(monkeypatch)
    torch.testing.assert_close(layers(x), expected)
    assert sorted(counts) == [37] * 6 + [38] * 6


def test_packed_weights_are_unpacked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked: list[int] = []
    real = native.PackedWeight.numbers

    def numbers(self: native.PackedWeight, *given: object, **more: object) -> Tensor:
        unpacked.append(len(self.codes))
        return real(self, *given, **more)

    monkeypatch.setattr(native.PackedWeight, "numbers", numbers)
    mlp("int8")(rows())
    assert sorted(unpacked) == [64, WIDE, WIDE]


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_a_layer_with_a_hook_is_called_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, x, calls = mlp(), rows(), []
    expected = whole(layers, x, monkeypatch)
    layers.get_submodule(name).register_forward_hook(lambda _, given, out: calls.append(len(out)))
    torch.testing.assert_close(layers(x), expected)
    assert calls == [ROWS]


def test_with_gradients_there_is_one_part() -> None:
    layers = (mlp().gate_proj,)
    assert len(linear.parted(layers, rows(), WIDE)) == 4
    with torch.enable_grad():
        assert len(linear.parted(layers, rows(), WIDE)) == 1


def test_rows_wider_than_what_is_kept_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "KEPT", 1)
    assert [len(part) for part in linear.parted((mlp().gate_proj,), rows(), WIDE)] == [1] * ROWS
