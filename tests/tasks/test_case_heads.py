"""Heads of cases: what they answer, which images it rests on, and that no case depends on another one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedvfm.tasks import case_heads

HEADS = ("attention-mil", "max", "mean", "mst")
WIDTH, CLASSES = 24, 3


def _head(name: str) -> case_heads.CaseHead:
    torch.manual_seed(3)
    head = case_heads.TABLE.get(name)(WIDTH, CLASSES)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return head.eval()


def _vectors(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32))


@pytest.mark.parametrize("name", HEADS)
def test_a_case_has_one_answer_whatever_stands_beside_it(name: str) -> None:
    head, short, long = _head(name), _vectors(2, 1), _vectors(7, 2)
    alone = head(case_heads.bags(short, [range(2)]))
    found = case_heads.bags(torch.cat((long, short)), [range(7), range(2)])
    beside, weights = head(found), head.weights(found)
    assert alone.shape == (1, CLASSES)
    assert torch.allclose(beside[1:], alone, atol=1e-5)
    assert torch.allclose(weights.sum(dim=1), torch.ones(2), atol=1e-5)
    assert not weights[1, 2:].any(), "padding has no weight"
    assert torch.allclose(weights[1, :2], head.weights(case_heads.bags(short, [range(2)]))[0], atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_order_counts_only_where_places_do(name: str) -> None:
    head, vectors = _head(name), _vectors(5)
    turned = head(case_heads.bags(vectors.flip(0), [range(5)]))
    straight = head(case_heads.bags(vectors, [range(5)]))
    assert torch.allclose(turned, straight, atol=1e-5) != (name == "mst")


def test_images_that_were_drawn_keep_their_places() -> None:
    head, vectors = _head("mst"), _vectors(2)
    near, far = (head(case_heads.bags(vectors, [places])) for places in ((0, 1), (0, 30)))
    assert not torch.allclose(near, far, atol=1e-4)


def test_gated_attention_by_hand() -> None:
    """Ilse et al., eq. (9), written out for two images."""
    head, vectors = _head("attention-mil"), _vectors(2)
    assert isinstance(head, case_heads.AttentionMil)
    rows = head.norm(vectors)
    scores = [
        head.score.weight[0] @ (torch.tanh(head.tanh(row)) * (1 / (1 + torch.exp(-head.gate(row))))) for row in rows
    ]
    first = 1 / (1 + torch.exp(scores[1] - scores[0]))
    expected = head.classify(first * rows[0] + (1 - first) * rows[1])
    assert torch.allclose(head(case_heads.bags(vectors, [range(2)]))[0], expected, atol=1e-5)


def test_positions_are_those_of_the_transformer() -> None:
    found = case_heads.positions(torch.tensor([[0, 3]]), 4)[0]
    expected = [[0.0, 0.0, 1.0, 1.0], [np.sin(3), np.sin(0.03), np.cos(3), np.cos(0.03)]]
    assert np.allclose(found.numpy(), expected, atol=1e-6)
    assert case_heads.positions(torch.tensor([[1]]), 5).shape == (1, 1, 5)


@pytest.mark.parametrize("name", HEADS)
def test_a_gradient_reaches_every_parameter(name: str) -> None:
    head = _head(name)
    torch.nn.functional.cross_entropy(head(case_heads.bags(_vectors(4), [range(4)])), torch.tensor([1])).backward()
    idle = [key for key, value in head.named_parameters() if value.grad is None or not value.grad.any()]
    # What every image adds alike to all scores of a softmax moves none of them.
    assert set(idle) <= {"layers.0.k.bias"}, idle


@pytest.mark.parametrize("name", HEADS)
def test_each_head_learns_which_cases_hold_one_image_unlike_the_others(name: str) -> None:
    rng = np.random.default_rng(1)
    places = [range(int(images)) for images in rng.integers(3, 7, 200)]
    parts = [torch.from_numpy(rng.normal(size=(len(own), WIDTH)).astype(np.float32)) for own in places]
    for part in parts[::2]:
        part[int(rng.integers(len(part))), :4] += 6
    truth = torch.tensor([at % 2 for at in range(200)])
    torch.manual_seed(0)
    head = case_heads.TABLE.get(name)(WIDTH, CLASSES)
    optimiser, found = torch.optim.AdamW(head.parameters(), lr=1e-2), case_heads.bags(torch.cat(parts), places)
    for _ in range(60):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(head(found), truth).backward()
        optimiser.step()
    assert (head(found).argmax(dim=1) == truth).float().mean() > 0.85
    if name == "attention-mil":
        heaviest = head.weights(found)[::2].argmax(dim=1)
        shifted = torch.stack([part[:, :4].sum(dim=1).argmax() for part in parts[::2]])
        assert (heaviest == shifted).float().mean() > 0.8


def test_the_class_token_alone_asks_in_the_last_layer() -> None:
    """A case of many images costs as many numbers as images, and the answer is that of all tokens asking."""
    head = _head("mst")
    assert isinstance(head, case_heads.SliceTransformer)
    (layer,) = head.layers
    hidden, seen = torch.randn(2, 6, WIDTH), torch.ones(2, 6, dtype=torch.bool)
    seen[1, 4:] = False
    (whole, all_weights), (token, weights) = (layer(hidden, seen, asking=asking) for asking in (6, 1))
    assert weights.shape[2] == 1
    assert torch.allclose(token, whole[:, :1], atol=1e-5)
    assert torch.allclose(weights, all_weights[:, :, :1], atol=1e-6)
