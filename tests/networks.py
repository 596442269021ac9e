"""One small network for each rule of the clipping engine, with a batch for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

N = 8
"""How many examples each batch has."""


def losses(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy, one number for each example."""
    inputs, targets = batch
    return functional.cross_entropy(network(inputs), targets, reduction="none")


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.layer = kind(5, 7, **{"batch_first": True, **options})
        self.last = nn.Linear(7 * (2 if options.get("bidirectional") else 1), 3)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.layer.batch_first:
            return self.last(self.layer(inputs)[0][:, -1])  # type: ignore[no-any-return]
        return self.last(self.layer(inputs.transpose(0, 1))[0][-1])  # type: ignore[no-any-return]


class Started(nn.Module):
    """Hands the last states of one LSTM to the next, as a translator does."""

    def __init__(self) -> None:
        super().__init__()
        self.reader, self.writer = nn.LSTM(5, 7, batch_first=True), nn.LSTM(5, 7, batch_first=True)
        self.last = nn.Linear(7, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        _, states = self.reader(inputs)
        return self.last(self.writer(inputs, states)[0].mean(1))  # type: ignore[no-any-return]


class Text(nn.Module):
    def __init__(self, *, is_causal: bool = False, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16, padding_idx=0)
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, **{"batch_first": True, **options})
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.last, self.is_causal = nn.Linear(16, 3), is_causal

    def forward(self, tokens: Tensor) -> Tensor:
        mask = (
            nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], tokens.device) if self.is_causal else None
        )
        padding = None if self.is_causal else tokens == 0
        hidden = self.encoder(self.table(tokens), mask=mask, src_key_padding_mask=padding, is_causal=self.is_causal)
        return self.last(hidden.mean(1))  # type: ignore[no-any-return]


class Odd(nn.Module):
    """A layer of nobody's, with parameters of its own: only vmap can take it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.other = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(3, 5))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.tanh(inputs * self.scale) @ self.other.T


def _tokens() -> Tensor:
    tokens = torch.randint(1, 20, (N, 9))
    tokens[:, :2] = tokens[:, 2:4]  # some are used twice
    tokens[::2, -2:] = 0
    return tokens


def cases() -> dict[str, tuple[nn.Module, Tensor]]:
    """By name: a network and inputs for it; targets are 0, 1 or 2."""
    torch.manual_seed(0)
    image = torch.randn(N, 2, 8, 8)
    sequence = torch.randn(N, 6, 5)
    return {
        "linear": (nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3, bias=False)), torch.randn(N, 5)),
        "linear on sequences": (
            nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2), nn.Flatten(), nn.Linear(12, 3)),
            sequence,
        ),
        "conv2d": (
            nn.Sequential(
                nn.Conv2d(2, 4, 3, stride=2, padding=1),
                nn.GroupNorm(2, 4),
                nn.ReLU(),
                nn.Conv2d(4, 6, 3, groups=2, padding="same", bias=False),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(24, 3),
            ),
            image,
        ),
        "conv2d, circular and dilated": (
            nn.Sequential(
                nn.Conv2d(2, 4, 3, padding=(1, 0), padding_mode="circular", dilation=(1, 2)),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(128, 3),
            ),
            image,
        ),
        "conv1d": (
            nn.Sequential(
                nn.Conv1d(6, 4, 2, stride=2, padding=1, dilation=2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)
            ),
            sequence,
        ),
        "norms": (
            nn.Sequential(
                nn.Linear(5, 6), nn.LayerNorm((6, 6)), nn.Linear(6, 6), nn.RMSNorm(6), nn.Flatten(), nn.Linear(36, 3)
            ),
            sequence,
        ),
        "instance norm": (
            nn.Sequential(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4), nn.Flatten(), nn.Linear(144, 3)),
            image,
        ),
        "lstm": (Recurrent(nn.LSTM, num_layers=2, bidirectional=True), sequence),
        "lstm, sequence first": (Recurrent(nn.LSTM, batch_first=False, bias=False), sequence),
        "lstm that starts where another ended": (Started(), sequence),
        "gru": (Recurrent(nn.GRU, num_layers=2, bidirectional=True), sequence),
        "rnn": (Recurrent(nn.RNN, nonlinearity="relu"), sequence),
        "attention": (Text(), _tokens()),
        "causal attention": (Text(is_causal=True, norm_first=True), _tokens()),
        "vmap": (nn.Sequential(nn.Linear(5, 5), Odd()), torch.randn(N, 5)),
        "partly frozen": (
            nn.Sequential(nn.Linear(5, 6).requires_grad_(False), nn.Tanh(), nn.Linear(6, 3)),
            torch.randn(N, 5),
        ),
    }
