"""Heads over cases: from one vector an image to one row of logits a case, and which images it rests on.

No BatchNorm, so that sites and privacy do not mix samples; and no case's result depends on the others beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedvfm import registry
from fedvfm.tasks import fusion as fusions

TABLE = registry.Table(
    "head of cases",
    {
        "attention-mil": "fedvfm.tasks.case_heads:AttentionMil",
        "max": "fedvfm.tasks.case_heads:Maximum",
        "mean": "fedvfm.tasks.case_heads:Mean",
        "mst": "fedvfm.tasks.case_heads:SliceTransformer",
    },
)

INNER = 128
"""Width of the gated attention, as Ilse et al. have it."""
WIDEST_HEADS = (12, 8, 6, 4, 3, 2, 1)
"""Numbers of attention heads; the first that divides the width is taken."""
LONGEST_WAVE = 10_000.0


@dataclass(frozen=True, slots=True)
class Parts:
    """Which images a batch of cases consists of.

    Attributes:
        places: of each case the places of its images in the whole case, from 0, ascending.
        vectors: what the backbone made of the images of all cases, one case after the other; None where they are still
            to be computed. Shapes: (N, D), N the number of places.
    """

    places: tuple[tuple[int, ...], ...]
    vectors: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Bags:
    """Cases side by side, the shorter ones padded.

    Shapes: vectors (B, S, D), zero where nothing is; present (B, S) of bool; places (B, S) of int64.
    """

    vectors: Tensor
    present: Tensor
    places: Tensor


def bags(vectors: Tensor, places: Sequence[Sequence[int]]) -> Bags:
    """Cases side by side.

    Shapes: vectors (N, D), the images of all cases one after the other; places has N numbers in all, B rows.
    """
    counts = [len(own) for own in places]
    parts = list(torch.split(vectors, counts))
    padded = nn.utils.rnn.pad_sequence(parts, batch_first=True)
    numbers = [torch.tensor(own, dtype=torch.int64) for own in places]
    lengths = torch.tensor(counts, device=vectors.device)
    present = torch.arange(padded.shape[1], device=vectors.device) < lengths[:, None]
    return Bags(padded, present, nn.utils.rnn.pad_sequence(numbers, batch_first=True).to(vectors.device))


class CaseHead(nn.Module):
    """Base of all heads of cases.

    Args:
        width: of the vectors, D.
        classes: K.
        layers: of a transformer; the others have none.
        fusion: of the case's vector with its row of the table, where the recipe takes one.
    """

    layered = False

    def __init__(self, width: int, classes: int, layers: int = 1, fusion: fusions.Fusion | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width if fusion is None else fusion.width, classes)
        self.fusion = fusion

    def forward(self, cases: Bags, rows: Tensor | None = None) -> Tensor:
        """Logits. Shapes: rows (B, C) as :class:`fedvfm.tasks.fusion.Fusion` takes them -> (B, K)."""
        pooled = self.pooled(cases)
        return fusions.answer(self.classify, pooled if self.fusion is None else self.fusion(pooled, rows))

    def pooled(self, cases: Bags) -> Tensor:
        """One vector a case. Shapes: (B, D)."""
        raise NotImplementedError

    def weights(self, cases: Bags) -> Tensor:
        """How much the result rests on each image: 0 or more, 1 in all for a case. Shapes: (B, S)."""
        raise NotImplementedError


class Mean(CaseHead):
    """The mean of the normalised vectors, and a linear layer: every image counts alike.

    Shapes: vectors (B, S, D) -> (B, K).
    """

    def pooled(self, cases: Bags) -> Tensor:
        """See CaseHead."""
        rows: Tensor = self.norm(cases.vectors) * self.weights(cases)[..., None]
        return rows.sum(dim=1)

    def weights(self, cases: Bags) -> Tensor:
        """See CaseHead."""
        present = cases.present.to(cases.vectors.dtype)
        return present / present.sum(dim=1, keepdim=True)


class Maximum(CaseHead):
    """The largest value of each channel of the normalised vectors over the images, and a linear layer.

    The weight of an image is the share of the channels in which it is the largest.

    Shapes: vectors (B, S, D) -> (B, K).
    """

    def pooled(self, cases: Bags) -> Tensor:
        """See CaseHead."""
        return self._rows(cases).amax(dim=1)

    def _rows(self, cases: Bags) -> Tensor:
        rows: Tensor = self.norm(cases.vectors)
        return rows.masked_fill(~cases.present[..., None], -math.inf)

    def weights(self, cases: Bags) -> Tensor:
        """See CaseHead."""
        largest = self._rows(cases).argmax(dim=1)
        numbers = torch.arange(cases.vectors.shape[1], device=largest.device)
        return (largest[..., None] == numbers).to(cases.vectors.dtype).mean(dim=1)


class AttentionMil(CaseHead):
    """Gated attention over the images of a case: a weighted mean whose weights are learned.

    Weight of image k: softmax over k of w . (tanh(V h_k) * sigmoid(U h_k)), h_k the normalised vector.

    Shapes: vectors (B, S, D) -> (B, K).
    Source: Ilse, Tomczak and Welling, "Attention-based Deep Multiple Instance Learning", ICML 2018, eqs. (7) and (9).
    """

    def __init__(self, width: int, classes: int, layers: int = 1, fusion: fusions.Fusion | None = None) -> None:
        super().__init__(width, classes, fusion=fusion)
        self.tanh = nn.Linear(width, INNER)
        self.gate = nn.Linear(width, INNER)
        self.score = nn.Linear(INNER, 1, bias=False)

    def pooled(self, cases: Bags) -> Tensor:
        """See CaseHead."""
        rows: Tensor = self.norm(cases.vectors)
        return (rows * self._weights(rows, cases.present)[..., None]).sum(dim=1)

    def weights(self, cases: Bags) -> Tensor:
        """See CaseHead."""
        return self._weights(self.norm(cases.vectors), cases.present)

    def _weights(self, rows: Tensor, present: Tensor) -> Tensor:
        scores: Tensor = self.score(torch.tanh(self.tanh(rows)) * torch.sigmoid(self.gate(rows)))[..., 0]
        return scores.masked_fill(~present, -math.inf).softmax(dim=1)


class SliceTransformer(CaseHead):
    """A small transformer over the images of a case with their places, read at a class token.

    Places are sines and cosines of the image's number in the whole case, so that a part of a case drawn in training
    keeps the places of its images. The weight of an image is the attention of the class token in the last layer, the
    mean over its heads.

    Shapes: vectors (B, S, D) -> (B, K).
    Source: Mueller-Franzes et al., "Medical Slice Transformer", arXiv 2411.15802 (2024), section 2: a transformer over
        the class tokens of DINOv2, one a slice; positions: Vaswani et al., "Attention Is All You Need", NIPS 2017,
        section 3.5.
    """

    layered = True

    def __init__(self, width: int, classes: int, layers: int = 1, fusion: fusions.Fusion | None = None) -> None:
        super().__init__(width, classes, fusion=fusion)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.trunc_normal_(self.token, std=0.02)
        self.enter = nn.LayerNorm(width)
        self.layers = nn.ModuleList([_Layer(width) for _ in range(layers)])

    def pooled(self, cases: Bags) -> Tensor:
        """See CaseHead."""
        hidden, _ = self._run(cases)
        rows: Tensor = self.norm(hidden[:, 0])
        return rows

    def weights(self, cases: Bags) -> Tensor:
        """See CaseHead."""
        _, attention = self._run(cases)
        own = attention.mean(dim=1)[:, 0, 1:]
        return own / own.sum(dim=1, keepdim=True)

    def _run(self, cases: Bags) -> tuple[Tensor, Tensor]:
        rows = self.enter(cases.vectors) + positions(cases.places, cases.vectors.shape[-1]).to(cases.vectors.dtype)
        hidden = torch.cat((self.token.to(rows.dtype).expand(len(rows), -1, -1), rows), dim=1)
        seen = torch.cat((cases.present.new_ones(len(rows), 1), cases.present), dim=1)
        attention = hidden
        for number, layer in enumerate(self.layers, 1):
            # Of the last layer the class token alone is read, so it alone asks there: S numbers and not S x S.
            hidden, attention = layer(hidden, seen, asking=1 if number == len(self.layers) else hidden.shape[1])
        return hidden, attention


class _Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to what entered.

    Shapes: hidden (B, T, D), seen (B, T) -> (B, asking, D), and attention (B, heads, asking, T): of the first tokens.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = next(number for number in WIDEST_HEADS if width % number == 0)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, hidden: Tensor, seen: Tensor, asking: int) -> tuple[Tensor, Tensor]:
        """See the class."""
        rows, hidden = self.norm1(hidden), hidden[:, :asking]
        pairs = ((self.q, rows[:, :asking]), (self.k, rows), (self.v, rows))
        q, k, v = (layer(given).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer, given in pairs)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        attention = scores.masked_fill(~seen[:, None, None], -math.inf).softmax(dim=-1)
        hidden = hidden + self.o((attention @ v).transpose(1, 2).reshape(hidden.shape))
        hidden = hidden + self.fc2(nn.functional.gelu(self.fc1(self.norm2(hidden))))
        return hidden, attention


def positions(places: Tensor, width: int) -> Tensor:
    """Sines and cosines of places, of waves from 2 pi to 20,000 pi. Shapes: (B, S) -> (B, S, width)."""
    half = (width + 1) // 2
    waves = torch.exp(torch.arange(half, device=places.device) * (-math.log(LONGEST_WAVE) / half))
    angles = places[..., None].float() * waves
    return torch.cat((angles.sin(), angles.cos()), dim=-1)[..., :width]
