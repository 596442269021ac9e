"""Torch modules as networks of the language: each layer with its options, whole networks, and every refusal by name."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from cloister_privacy.architecture.importers import Imported, ModelNotSupported, from_torch
from cloister_privacy.training.examples import synthetic
from cloister_privacy.training.guard import GUARD_EXAMPLES, guard, require_exact_clipping
from importing import architecture_of, examples_of, network_of, require_equal

few = settings(max_examples=8, deadline=None)
small = st.integers(1, 4)


class Ends(nn.Module):
    """A body, and a linear layer on all that it gives."""

    def __init__(self, body: nn.Module | Callable[[Tensor], Tensor], shape: tuple[int, ...], *, width: int = 3) -> None:
        super().__init__()
        self.body = body
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.head = nn.Linear(math.prod(body(torch.zeros(2, *shape)).shape[1:]), width)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))  # type: ignore[no-any-return]


def same(module: nn.Module, inputs: dict[str, tuple[int, ...]] | tuple[int, ...], *, width: int = 3) -> Imported:
    """Import a module, and require that the network of it computes the same on other examples than the importer tried."""
    imported = from_torch(module, inputs)
    network = network_of(imported, width=width)
    values = examples_of(network)
    with torch.no_grad():
        expected = module.eval()(*values.values())
    require_equal(network, values, expected)
    return imported


def kinds(imported: Imported) -> list[str]:
    return [layer.type for layer in imported.layers]


@few
@given(small, small, st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2), st.booleans())
def test_a_convolution_over_a_line_is_the_same(
    into: int, out: int, kernel: int, stride: int, padding: int, dilation: int, bias: bool
) -> None:
    body = nn.Conv1d(into, out * into, kernel, stride, padding, dilation, groups=into, bias=bias)
    assert kinds(same(Ends(body, (into, 9)), (into, 9))) == ["conv1d", "flatten", "linear"]


@few
@given(small, small, st.sampled_from([1, 3, (3, 1)]), st.sampled_from([0, "same", "valid", (1, 0)]), st.booleans())
def test_a_convolution_over_an_image_is_the_same(into: int, out: int, kernel: Any, padding: Any, bias: bool) -> None:
    same(Ends(nn.Conv2d(into, out, kernel, padding=padding, bias=bias), (into, 7, 6)), (into, 7, 6))


@few
@given(
    st.sampled_from([nn.MaxPool1d, nn.AvgPool1d, nn.MaxPool2d, nn.AvgPool2d]),
    st.integers(2, 3),
    st.sampled_from([None, 1, 2]),
    st.integers(0, 1),
)
def test_a_pool_is_the_same(kind: Any, kernel: int, stride: int | None, padding: int) -> None:
    shape = (2, 8) if kind in (nn.MaxPool1d, nn.AvgPool1d) else (2, 8, 6)
    same(Ends(kind(kernel, stride, padding), shape), shape)


@few
@given(
    st.sampled_from(
        [
            (nn.AdaptiveAvgPool1d(1), (3, 8)),
            (nn.AdaptiveMaxPool1d(4), (3, 8)),
            (nn.AdaptiveAvgPool2d(1), (3, 8, 6)),
            (nn.AdaptiveAvgPool2d((None, 2)), (3, 8, 6)),
            (nn.AdaptiveMaxPool2d(2), (3, 8, 6)),
            (nn.AdaptiveAvgPool2d(8), (3, 8, 8)),
        ]
    )
)
def test_a_pool_to_a_size_is_the_same(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    same(Ends(*case), case[1])


ACTIVATIONS = [
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.LeakyReLU(0.2),
    nn.ELU(0.5),
    nn.SELU(),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.SiLU(inplace=True),
    nn.Sigmoid(),
    nn.Tanh(),
    nn.Softmax(dim=-1),
    nn.Softmax(dim=1),
    nn.GLU(dim=1),
    nn.Dropout(0.3),
    nn.Dropout(0.0),
    nn.Identity(),
    nn.LayerNorm(6, eps=1e-3),
    nn.LayerNorm((4, 6)),
    nn.LayerNorm(6, elementwise_affine=False),
    nn.LayerNorm(6, bias=False),
    nn.RMSNorm(6),
    nn.RMSNorm((4, 6), eps=1e-4),
    nn.GroupNorm(2, 4),
    nn.GroupNorm(4, 4, affine=False),
    nn.InstanceNorm1d(4, affine=True),
    nn.Linear(6, 5),
    nn.Linear(6, 5, bias=False),
    nn.Flatten(),
    nn.Unflatten(1, (2, 2)),
    nn.ZeroPad1d(0),
]


@pytest.mark.parametrize("body", ACTIVATIONS, ids=str)
def test_a_layer_between_others_is_the_same(body: nn.Module) -> None:
    same(Ends(nn.Sequential(nn.Linear(6, 6), body), (4, 6)), (4, 6))


FUNCTIONS: list[Callable[[Tensor], Tensor]] = [
    lambda x: functional.relu(x) + torch.tanh(x),
    lambda x: x.view(x.size(0), -1),
    lambda x: x.reshape(len(x), x.shape[1] * x.shape[2], -1),
    lambda x: torch.flatten(x, 1) * 2 - 1,
    lambda x: (1 - x) / 255,
    lambda x: -x.permute(0, 3, 1, 2),
    lambda x: x.transpose(1, -1).contiguous().clone(),
    lambda x: x.movedim(1, 3).unsqueeze(1).squeeze(1),
    lambda x: x.mT,
    lambda x: torch.cat([x, x * x, x**2], dim=2),
    lambda x: torch.stack([x.mean(1), x.amax(1)], dim=1),
    lambda x: x.mean((2, 3)) + x.sum((2, 3)),
    lambda x: x.mean(dim=1, keepdim=True) * x,
    lambda x: x * torch.sigmoid(x.mean((2, 3)))[:, :, None, None],
    lambda x: x.max(dim=2).values - x.min(2)[0],
    lambda x: x[:, 0] + x[:, -1] + x[:, :, 0, :].mean(1, keepdim=True),
    lambda x: x[..., ::2],
    lambda x: x[:, [2, 0]],
    lambda x: x.chunk(2, dim=2)[1] + x.split([2, 2], 2)[0],
    lambda x: x.flip(2) + x.select(1, 0).unsqueeze(1) + x.narrow(1, 0, 1),
    lambda x: sum(each for each in x.unbind(1)),  # type: ignore[return-value]
    lambda x: functional.max_pool2d(functional.gelu(x), 2),
    lambda x: functional.softmax(x, dim=1) * functional.silu(x),
    lambda x: functional.dropout(x, 0.5, training=False).clamp(min=0),
    lambda x: functional.layer_norm(x, x.shape[2:]) + torch.arange(6.0),
    lambda x: (x - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([1.0, 2.0, 3.0])[:, None, None],
    lambda x: x + torch.zeros(x.size(0), *x.shape[1:]) + torch.ones_like(x),
    lambda x: functional.normalize(x) if x.shape[1] > 100 else x.add_(1).mul_(2),
]


class Does(nn.Module):
    def __init__(self, what: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        return self.what(x + 0)


@pytest.mark.parametrize("number", range(len(FUNCTIONS)))
def test_what_forward_does_to_a_tensor_is_the_same(number: int) -> None:
    same(Ends(Does(FUNCTIONS[number]), (3, 4, 6)), (3, 4, 6))


class Parameters(nn.Module):
    """Weights of its own, and no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(3))
        self.place, self.scale = nn.Parameter(torch.randn(1, 5, 6)), nn.Parameter(torch.randn(6))
        self.one, self.first = nn.Parameter(torch.randn(())), nn.Parameter(torch.randn(1, 1, 6))
        self.register_buffer("fixed", torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.first.expand(len(x), -1, -1), x], dim=1)
        x = torch.tanh((x + self.place[:, : x.shape[1]]) * self.scale * self.one + self.fixed)
        return (x @ self.weight + self.bias).mean(1)


def test_weights_that_forward_uses_itself_are_weights_of_layers() -> None:
    imported = same(Parameters(), (4, 6))
    sizes = sorted(array.size for array in imported.weights.values())
    assert {18, 3, 30, 1, 6} <= set(sizes)  # and fixed ones among them
    assert [layer.bias for layer in imported.layers if layer.type == "linear" and layer.out_features == 3] == [True]


class Reads(nn.Module):
    """A recurrent layer, read in one of the ways in which people do."""

    def __init__(self, kind: Any, way: str, **options: Any) -> None:
        super().__init__()
        self.layer = kind(5, 4, batch_first=True, **options)
        directions = 2 if options.get("bidirectional") else 1
        self.head = nn.Linear(4 if way in ("state", "backwards") else 4 * directions, 3)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        outputs, states = self.layer(x)
        hidden = states[0] if isinstance(states, tuple) else states
        match self.way:
            case "mean":
                read = outputs.mean(dim=1)
            case "last":
                read = outputs[:, -1, :]
            case "state":
                read = hidden[-2] if self.layer.bidirectional else hidden[-1]
            case "backwards":
                read = hidden[-1]
            case "states":
                read = torch.cat([hidden[-2], hidden[-1]], dim=1)
            case _:
                read = outputs[:, -1] + hidden[-1] + outputs.mean(1)
        return self.head(read)  # type: ignore[no-any-return]


@settings(max_examples=14, deadline=None)
@given(
    st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]),
    st.sampled_from(["mean", "last", "state", "backwards", "states", "both"]),
    st.booleans(),
    st.integers(1, 2),
    st.booleans(),
)
def test_a_recurrent_layer_is_the_same(kind: Any, way: str, bidirectional: bool, num_layers: int, bias: bool) -> None:
    bidirectional = (bidirectional and way != "both") or way == "states"
    way = "state" if way == "backwards" and not bidirectional else way
    options: dict[str, Any] = {"num_layers": num_layers, "bidirectional": bidirectional, "bias": bias}
    same(Reads(kind, way, **options, **({"nonlinearity": "relu"} if kind is nn.RNN else {})), (6, 5))


class Text(nn.Module):
    """Words, places, an encoder of one of two kinds, and a mean over all places."""

    def __init__(self, *, encoder: str, is_causal: bool = False, hides: bool = False, **options: Any) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(257, 8, padding_idx=0), nn.Embedding(32, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, **({"dropout": 0.1} | options))
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False)
        self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)
        self.kind, self.is_causal, self.hides = encoder, is_causal, hides

    def forward(self, tokens: Tensor) -> Tensor:
        _, length = tokens.shape
        x = self.words(tokens) + self.places(torch.arange(length, device=tokens.device))
        mask = nn.Transformer.generate_square_subsequent_mask(length) if self.is_causal else None
        absent = (tokens == 0) if self.hides else None
        if self.kind == "attention":
            y = self.norm(x)
            mask = mask if mask is None or absent is None else torch.triu(torch.ones(length, length), 1).bool()
            x = x + self.attention(y, y, self.norm(x), attn_mask=mask, key_padding_mask=absent)[0]
        else:
            mask = mask if mask is None or absent is None else torch.triu(torch.ones(length, length), 1).bool()
            x = self.encoder(x, mask, absent)
        return self.head(x.mean(1))  # type: ignore[no-any-return]


@few
@given(
    st.sampled_from(["attention", "encoder"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["relu", "gelu"]),
)
def test_attention_is_the_same(encoder: str, is_causal: bool, hides: bool, norm_first: bool, activation: str) -> None:
    module = Text(encoder=encoder, is_causal=is_causal, hides=hides, norm_first=norm_first, activation=activation)
    imported = same(module, (7,))
    kind = "transformer_layer" if encoder == "encoder" else "multihead_attention"
    assert [
        layer.reads is not None and "tokens" in layer.reads for layer in imported.layers if layer.type == kind
    ].count(hides) == (2 if encoder == "encoder" else 1)
    assert any("no tokenizer is imported" in each for each in imported.warnings)


class Spelt(nn.Module):
    """Attention as people write it out."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.project, self.out, self.head = nn.Linear(8, 24, bias=way != "products"), nn.Linear(8, 8), nn.Linear(8, 3)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.register_buffer("mask", torch.tril(torch.ones(9, 9)).view(1, 1, 9, 9))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        match self.way:
            case "three":
                q, k, v = (each(x).view(n, length, 2, 4).transpose(1, 2) for each in (self.query, self.key, self.value))
            case "unbind":
                q, k, v = self.project(x).reshape(n, length, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
            case _:
                q, k, v = (each.view(n, length, 2, 4).transpose(1, 2) for each in self.project(x).split(width, dim=2))
        if self.way in ("products", "three"):
            scores = (q @ k.transpose(-2, -1)) / 2.5
            if self.way == "products":
                scores = scores.masked_fill(self.mask[:, :, :length, :length] == 0, float("-inf"))
            y = scores.softmax(dim=-1) @ v
        else:
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=self.way == "causal")
        y = y.transpose(1, 2).reshape(n, length, width)
        return self.head((x + (y if self.way == "bare" else self.out(y))).mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", ["three", "unbind", "causal", "products", "bare"])
def test_attention_that_is_spelt_out_is_attention(way: str) -> None:
    imported = same(Spelt(way), (6, 8))
    assert kinds(imported)[:2] == ["multihead_attention", "add"] and kinds(imported).count("linear") == 1
    assert imported.layers[0].causal == (way in ("causal", "products"))
    assert any("starts as the identity" in each for each in imported.warnings) == (way == "bare")


class Averages(nn.Module):
    """Over the words that are there, as people write it."""

    def __init__(self, way: int) -> None:
        super().__init__()
        self.words, self.head, self.way = nn.Embedding(257, 4), nn.Linear(4, 3), way

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.words(tokens))
        if self.way == 0:
            mask = (tokens != 0).float()
            return self.head((x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True))  # type: ignore[no-any-return]
        mask = (~(tokens == 0)).unsqueeze(-1).expand(x.size()).float()
        return self.head(torch.sum(mask * x, 1) / torch.clamp(mask.sum(1), min=1e-9))  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", [0, 1])
def test_a_mean_over_the_words_that_are_there_is_the_same(way: int) -> None:
    [pool] = [layer for layer in same(Averages(way), (7,)).layers if layer.type == "sequence_pool"]
    assert pool.reads is not None and pool.reads[1] == "tokens"


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.GroupNorm(2, 8), nn.ReLU(inplace=True))
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), nn.Sigmoid())
        self.down = nn.Conv2d(8, 16, 1, stride=2)
        self.head = nn.Linear(16, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        y = self.second(functional.relu(self.first(x)))
        x = functional.relu(x + y * self.squeeze(y).view(-1, 8, 1, 1))
        return functional.log_softmax(self.head(self.down(x).mean([2, 3])), dim=1)


class Vision(nn.Module):
    """A small ViT: patches, a learned first token, learned places."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.first, self.places = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.size(0), -1, -1), x], dim=1) + self.places
        return self.head(self.encoder(x)[:, 0])  # type: ignore[no-any-return]


class Joined(nn.Module):
    """An image and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.look, self.ask = nn.Conv2d(3, 4, 3), nn.Linear(5, 4)
        self.head = nn.Linear(8, 1)

    def forward(self, image: Tensor, facts: Tensor, mask: Tensor | None = None) -> Tensor:
        seen = self.look(image).amax(dim=(2, 3))
        joined = torch.cat((seen, torch.relu(self.ask(facts))), 1)
        return self.head(joined if mask is None else joined * mask).squeeze(-1)  # type: ignore[no-any-return]


IMAGE = (3, 8, 8)
NETWORKS: list[tuple[nn.Module, Any, int]] = [
    (Residual(), IMAGE, 3),
    (Vision(), IMAGE, 3),
    (Text(encoder="encoder"), {"tokens": (9,)}, 3),
    (Joined(), {"facts": (5,), "image": IMAGE}, 1),
    (nn.Sequential(nn.Embedding(257, 6), Reads(nn.LSTM, "last", bidirectional=False)), (7,), 3),
]


def _fits(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.Sequential) and isinstance(module[1], Reads):
        module[0] = nn.Embedding(257, 5)
    return module


@pytest.mark.parametrize(("module", "inputs", "width"), NETWORKS, ids=lambda given: type(given).__name__)
def test_a_whole_network_is_the_same_and_can_be_trained_privately(module: nn.Module, inputs: Any, width: int) -> None:
    imported = from_torch(_fits(module), inputs)
    network = network_of(imported, width=width)
    values = examples_of(network)
    with torch.no_grad():
        expected = (
            module(values["image"], values["facts"]) if isinstance(module, Joined) else module.eval()(*values.values())
        )
    ours = network(values)
    require_equal(
        network, values, expected if not isinstance(module, Residual) else expected - expected[:, :1] + ours[:, :1]
    )
    batch = synthetic(architecture_of(imported, width=width), GUARD_EXAMPLES, device="cpu")
    guard(network)
    require_exact_clipping(network, lambda net, rows: net.losses(net(rows[0]), rows[1]), batch)  # type: ignore[operator]


def test_the_digest_is_that_of_the_network_that_training_starts_from() -> None:
    imported = from_torch(Residual(), IMAGE)
    network = network_of(imported, width=3)
    assert imported.digest == hashlib.sha256(safetensors.torch.save(network.state_dict())).hexdigest()


def test_layers_are_named_by_their_paths_and_inputs_by_the_arguments_of_forward() -> None:
    imported = from_torch(Joined(), {"facts": (5,), "image": IMAGE})
    assert {layer.name for layer in imported.layers} >= {"look", "ask", "head"}
    assert imported.inputs == {"facts": (5,), "image": IMAGE}
    sequential = from_torch(nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 3))), (4,))
    assert [layer.name for layer in sequential.layers] == ["linear-0", None, "linear-1-1"]
    assert list(sequential.weights) == ["layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias"]


def test_a_layer_that_the_source_does_not_train_is_frozen() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    module[0].requires_grad_(False)
    module[2].bias.requires_grad_(False)
    imported = from_torch(module, (4,))
    assert [getattr(layer, "frozen", None) for layer in imported.layers] == [True, None, False]
    assert imported.warnings == (
        "2 (Linear): is frozen in part; here a layer is trained as a whole or not at all, so it is trained",
    )


def test_the_last_softmax_and_sigmoid_are_left_out_with_a_warning_and_a_log_softmax_without() -> None:
    for last, told in ((nn.Softmax(1), True), (nn.Sigmoid(), True), (nn.LogSoftmax(1), False)):
        imported = from_torch(nn.Sequential(nn.Linear(4, 3), last), (4,))
        assert kinds(imported) == ["linear"]
        assert any("is left out" in each for each in imported.warnings) == told


def test_importing_leaves_the_module_as_it_was() -> None:
    module = Residual().train()
    module.squeeze.eval()
    before = {name: each.clone() for name, each in module.state_dict().items()}
    from_torch(module, IMAGE)
    assert module.training and module.stem.training and not module.squeeze.training
    assert all(torch.equal(each, before[name]) for name, each in module.state_dict().items())
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in module.modules())


def test_weights_that_take_no_part_are_left_out_with_a_warning() -> None:
    module = Joined()
    module.spare = nn.Linear(2, 2)
    imported = from_torch(module, {"facts": (5,), "image": IMAGE})
    assert "spare.weight: takes no part in the output, so it is left out" in imported.warnings
    assert len(imported.weights) == 6


def test_one_layer_asked_the_same_twice_is_one_layer() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attention, self.head = (
                nn.LayerNorm(4),
                nn.MultiheadAttention(4, 2, batch_first=True),
                nn.Linear(4, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(self.norm(x), self.norm(x), self.norm(x), need_weights=False)[0]
            return self.head(x[:, -1])  # type: ignore[no-any-return]

    assert kinds(same(Twice(), (6, 4))).count("layer_norm") == 1


def test_a_wrapped_module_is_looked_into() -> None:
    class Compiled(nn.Module):  # as torch.compile wraps one
        def __init__(self) -> None:
            super().__init__()
            self._orig_mod = nn.Sequential(nn.Linear(4, 3))

    assert kinds(from_torch(nn.DataParallel(Compiled()), (4,))) == ["linear"]


class Chooses(nn.Module):
    def __init__(self, how: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.how, self.layer, self.other = how, nn.Linear(4, 4), nn.Linear(4, 4)
        self.lstm = nn.LSTM(4, 4, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return self.how(self, x)


def tied() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    module[2].weight = module[0].weight
    return module


def hooked() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True)
    layer.register_forward_hook(lambda *_: None)
    return layer


LINE, GRID, VECTOR = (5, 4), (4, 7, 7), (4,)
REFUSED: list[tuple[Any, tuple[int, ...], str]] = [
    (nn.BatchNorm1d(4), VECTOR, r"BatchNorm1d: normalises over the examples.*use GroupNorm"),
    (nn.BatchNorm2d(4), GRID, "use GroupNorm"),
    (nn.InstanceNorm2d(4, track_running_stats=True), GRID, "track_running_stats=False"),
    (nn.Conv2d(4, 4, 3, padding_mode="circular", padding=1), GRID, "padding_mode='zeros'"),
    (nn.Conv2d(4, 4, 4, padding="same"), GRID, "take an odd kernel"),
    (nn.Conv3d(1, 1, 1), (1, 2, 2, 2), "use torch.nn.Conv2d"),
    (nn.ConvTranspose2d(4, 4, 3), GRID, "conv_transpose2d has no form"),
    (nn.MaxPool2d(2, ceil_mode=True), GRID, "ceil_mode=True: make it False"),
    (nn.MaxPool2d(2, dilation=2), GRID, "dilation: make it 1"),
    (nn.AvgPool2d(3, padding=1, count_include_pad=False), GRID, "count_include_pad=False"),
    (nn.AdaptiveAvgPool2d(3), GRID, "pieces of unequal length"),
    (nn.LSTM(4, 4), LINE, "make it with batch_first=True"),
    (nn.LSTM(4, 4, proj_size=2, batch_first=True), LINE, "proj_size"),
    (nn.MultiheadAttention(4, 2), LINE, "missing|needs 'key'"),
    (nn.TransformerEncoderLayer(4, 2, 4), LINE, "batch_first=False"),
    (nn.TransformerEncoderLayer(4, 2, 4, batch_first=True, activation=torch.tanh), LINE, "take one of these"),
    (hooked(), LINE, "remove them first"),
    (nn.PReLU(), VECTOR, "prelu has no form in the language; use torch.nn.LeakyReLU"),
    (nn.ReLU6(), VECTOR, "use torch.nn.ReLU|use torch.nn.Tanh"),
    (nn.Hardswish(), VECTOR, "use torch.nn.SiLU"),
    (nn.Embedding(9, 4, max_norm=1.0), (5,), "max_norm"),
    (nn.Linear(4, 3).double(), VECTOR, "weight is torch.float64, and weights are float32; call module.float"),
    (nn.LazyLinear(3), VECTOR, "run the module once"),
    (tied(), VECTOR, "shares 0.weight with 0"),
    (nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), VECTOR, "remove_parametrizations"),
    (nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(1), nn.Linear(3, 3)), VECTOR, "log_softmax within the network"),
    (nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(0)), VECTOR, "across the examples"),
    (nn.Tanh(), VECTOR, "nothing to learn"),
    (nn.Conv2d(4, 4, 3), GRID, "end with a vector"),
    (Chooses(lambda m, x: m.layer(x) if x.sum() > 0 else x), VECTOR, "bool looks at the numbers"),
    (Chooses(lambda m, x: m.layer(x) * x[0, 0].item()), VECTOR, "item looks at the numbers|chooses among the examples"),
    (Chooses(lambda m, x: m.layer(m.layer(x))), VECTOR, "shares layer.weight with layer"),
    (Chooses(lambda m, x: m.layer(x) / m.other(x)), VECTOR, "not a constant"),
    (Chooses(lambda m, x: m.layer(x) - x.mean(0)), VECTOR, "across the examples"),
    (Chooses(lambda m, x: m.layer(x)[:1]), VECTOR, "chooses among the examples"),
    (Chooses(lambda m, x: m.layer(x.transpose(0, 1))), LINE, "moves the examples"),
    (Chooses(lambda m, x: m.layer(x.reshape(-1, 4)).view(-1, 20)), LINE, "keep the examples as the first dimension"),
    (Chooses(lambda m, x: torch.einsum("bi,bj->bij", x, m.layer(x))), VECTOR, "write it with linear layers"),
    (Chooses(lambda m, x: torch.bmm(x, x.mT)), LINE, "use torch.nn.MultiheadAttention"),
    (Chooses(lambda m, x: functional.scaled_dot_product_attention(x, x, x)), LINE, "use torch.nn.MultiheadAttention"),
    (Chooses(lambda m, x: m.attention(x, m.layer(x), x)[0]), LINE, "self-attention"),
    (Chooses(lambda m, x: m.attention(x, x, x)[1]), LINE, "something else than one tensor"),
    (
        Chooses(lambda m, x: m.layer(m.attention(x, x, x)[1].mean(1))),
        LINE,
        "attention weights, which the language does not give",
    ),
    (Chooses(lambda m, x: m.attention(x, x, x, attn_mask=torch.eye(5).bool())[0]), LINE, "not causal"),
    (Chooses(lambda m, x: m.lstm(x, (torch.ones(2, len(x), 4),) * 2)[0]), LINE, "begin from zeros"),
    (Chooses(lambda m, x: m.layer(m.lstm(x)[1][1][-1])), LINE, "the last cell state of an LSTM"),
    (Chooses(lambda m, x: nn.Linear(4, 3)(m.layer(x))), VECTOR, "nothing|computes otherwise"),
    (Chooses(lambda m, x: m.layer(x) + torch.randn(4)), VECTOR, "computes otherwise"),
    (Chooses(lambda m, x: m.layer(x).cumsum(1)), VECTOR, "cumsum has no form in the language"),
    (Chooses(lambda m, x: (m.layer(x), x)), VECTOR, "return the output alone"),
    (Chooses(lambda m, x: functional.pad(m.layer(x), (1, 1))), VECTOR, "ends with a padding"),
    (Chooses(lambda m, x: m.missing(x)), VECTOR, "AttributeError"),
    (Chooses(lambda m, x: functional.pad(m.layer(x), (1, 1)).tanh()), VECTOR, "only a convolution does"),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
@pytest.mark.filterwarnings("ignore")
def test_what_the_language_cannot_say_is_refused_by_name_and_with_the_cure(number: int) -> None:
    module, shape, told = REFUSED[number]
    with pytest.raises(ModelNotSupported, match=told):
        from_torch(module, shape)


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused_as_it_cannot_be_looked_into() -> None:
    with pytest.raises(ModelNotSupported, match="is TorchScript"):
        from_torch(torch.jit.trace(nn.Linear(4, 3), torch.zeros(2, 4)), VECTOR)


def test_a_refusal_lists_every_layer_that_cannot_be_mapped() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding_mode="reflect", padding=1),
        nn.BatchNorm2d(4),
        nn.Hardswish(),
        nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), nn.Flatten()),
        nn.Linear(64, 3),
    )
    with pytest.raises(ModelNotSupported) as refused:
        from_torch(module, (3, 8, 8))
    assert [each.split(":")[0] for each in refused.value.problems] == [
        "0 (Conv2d)",
        "1 (BatchNorm2d)",
        "2 (Hardswish)",
        "3.0 (MaxPool2d)",
    ]
    assert all(each in str(refused.value) for each in refused.value.problems)


def test_inputs_that_forward_does_not_take_or_lacks_are_refused_by_name() -> None:
    with pytest.raises(ModelNotSupported, match="forward takes no 'images'; it takes image, facts, mask") as refused:
        from_torch(Joined(), {"images": IMAGE, "image": IMAGE})
    assert "forward needs 'facts'" in str(refused.value)


def test_a_choice_over_shapes_is_taken_and_a_padding_is_the_convolutions() -> None:
    class Loops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv1d(4, 4, 3) for _ in range(3))
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            assert isinstance(x, Tensor) and x.dim() == 3
            for layer in self.layers:
                x = layer(functional.pad(x, (1, 1))).relu()
            return self.head(x.mean(-1) if x.shape[-1] > 2 else x[..., 0])  # type: ignore[no-any-return]

    imported = same(Loops(), (4, 6))
    assert [layer.padding for layer in imported.layers if layer.type == "conv1d"] == [1, 1, 1]


def test_a_small_table_of_tokens_is_imported_with_a_warning() -> None:
    imported = from_torch(nn.Sequential(nn.Embedding(20, 4), nn.Flatten(), nn.Linear(12, 3)), (3,))
    assert any("is read by a table of 20 rows" in each for each in imported.warnings)


def test_a_single_index_is_a_category() -> None:
    imported = from_torch(nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 3)), ())
    network = network_of(imported, width=3)
    assert imported.inputs == {"input": ()}
    assert network(examples_of(network)).shape == (5, 3)


def test_imported_weights_are_a_copy() -> None:
    module = nn.Sequential(nn.Linear(4, 3))
    imported = from_torch(module, (4,))
    digest = imported.digest
    with torch.no_grad():
        module[0].weight.zero_()
    assert imported.digest == digest
    assert all(array.flags.writeable and array.flags.c_contiguous for array in imported.weights.values())


def test_weights_that_are_not_finite_or_not_there_are_refused() -> None:
    module = nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad():
        module[0].bias[1] = torch.nan
    with pytest.raises(
        ModelNotSupported, match=r"layers\.0\.bias: holds numbers that are not finite|computes otherwise"
    ):
        from_torch(module, (4,))
    with pytest.raises(ModelNotSupported, match="0 \\(Linear\\): weight holds no numbers"):
        from_torch(module.to("meta"), (4,))


def test_states_of_zeros_that_forward_makes_are_the_usual_ones() -> None:
    class Begins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            zeros = torch.zeros(1, x.size(0), 5, device=x.device)
            out, (hidden, _) = self.lstm(x, (zeros, zeros))
            return self.head(torch.relu(hidden.squeeze(0)) + out.amax(1))  # type: ignore[no-any-return]

    same(Begins(), (6, 4))
