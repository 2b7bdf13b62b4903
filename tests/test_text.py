"""Texts: which token is the last, packed rows taken apart, and the losses of whole sequences."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import ntk_monitor as ntk
from ntk_monitor.errors import InputError
from ntk_monitor.losses import IGNORED, token_cross_entropy
from ntk_monitor.text import at, last_tokens, unpacked
from tests.reference import ntk as double_loop
from tests.reference import rows

VOCABULARY = 5


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=5))
def test_the_last_token_is_the_last_that_is_no_padding(sizes: list[tuple[int, int]]) -> None:
    mask = torch.zeros(len(sizes), 8, dtype=torch.long)
    for row, (left, real) in enumerate(sizes):
        mask[row, left : left + real] = 1
    outputs = torch.arange(len(sizes) * 8.0).reshape(len(sizes), 8, 1)
    chosen = at(outputs, "last", mask)
    for row, (left, real) in enumerate(sizes):
        assert chosen[row, 0] == outputs[row, left + real - 1, 0]


def test_positions_without_a_mask_and_by_index() -> None:
    outputs = torch.randn(3, 4, VOCABULARY)
    assert last_tokens(None, 4) == 3
    assert torch.equal(at(outputs, "last"), outputs[:, 3])
    assert torch.equal(at(outputs, (0, -2)), outputs[:, [0, 2]])


@pytest.mark.parametrize(
    ("outputs", "positions", "sentence"),
    [(torch.randn(3, 4), "last", "needs outputs"), (torch.randn(3, 4, 5), (4,), "must lie in a sequence of 4")],
)
def test_positions_that_are_not_there_are_refused(outputs: Tensor, positions: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        at(outputs, positions)


@given(st.lists(st.lists(st.integers(1, 5), min_size=2, max_size=3), min_size=1, max_size=3))
def test_packed_rows_come_apart_into_the_documents_they_were_made_of(packing: list[list[int]]) -> None:
    width = max(sum(lengths) for lengths in packing)
    packing = [[*lengths, width - sum(lengths)] if sum(lengths) < width else lengths for lengths in packing]
    documents = [torch.randint(1, 50, (length,)) for lengths in packing for length in lengths]
    labels = [torch.cat([torch.tensor([IGNORED]), document[1:]]) for document in documents]
    places = iter(range(len(documents)))
    chosen = [[next(places) for _ in lengths] for lengths in packing]
    batch = {
        "input_ids": torch.stack([torch.cat([documents[i] for i in row]) for row in chosen]),
        "labels": torch.stack([torch.cat([labels[i] for i in row]) for row in chosen]),
        "position_ids": torch.stack([torch.cat([torch.arange(len(documents[i])) for i in row]) for row in chosen]),
        "cu_seq_lens_q": torch.tensor([0, 1]),
        "max_length_q": 9,
    }
    # A document of one token is followed by position 0, as are all others: every boundary shows.
    found = unpacked(batch)
    assert found is not None
    assert set(found) == {"input_ids", "labels", "position_ids", "attention_mask"}
    for row, (document, label) in enumerate(zip(documents, labels, strict=True)):
        length = len(document)
        assert torch.equal(found["input_ids"][row, :length], document)
        assert torch.equal(found["labels"][row, :length], label)
        assert torch.equal(found["position_ids"][row, :length], torch.arange(length))
        assert found["attention_mask"][row].tolist() == [1] * length + [0] * (found["labels"].shape[1] - length)
        assert (found["labels"][row, length:] == IGNORED).all()


def _packed(**changes: Any) -> dict[str, Any]:
    ids = torch.tensor([[5, 6, 7, 8]])
    return {
        "input_ids": ids,
        "labels": torch.tensor([[5, 6, -100, 8]]),
        "position_ids": torch.tensor([[0, 1, 0, 1]]),
    } | changes


@pytest.mark.parametrize(
    "batch",
    [
        _packed(position_ids=torch.arange(4)[None]),  # one document
        _packed(labels=torch.tensor([[5, 6, 7, 8]])),  # the second document is predicted from the first
        _packed(attention_mask=torch.ones(1, 4)),
        _packed(token_scores=torch.ones(1, 3)),
        {"input_ids": torch.ones(1, 4, dtype=torch.long)},
        torch.ones(1, 4),
    ],
)
def test_what_is_not_packed_stays_whole(batch: Any) -> None:
    assert unpacked(batch) is None


class Speaker(nn.Module):
    """The smallest model of language: what comes next depends on the mean of the tokens so far."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 3), nn.Linear(3, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        seen = self.embedding(tokens).cumsum(1) / torch.arange(1, tokens.shape[1] + 1)[:, None]
        out: Tensor = self.head(seen)
        return out


def _talk() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (4, 6))
    labels = torch.where(torch.rand(4, 6) < 0.4, IGNORED, tokens)
    labels[1, 2:] = IGNORED  # few tokens
    return Speaker().double(), tokens, labels


def _twin(logits: Tensor, labels: Tensor, shift: bool, epsilon: float) -> Tensor:
    """Losses of whole sequences, token by token."""
    n, length = labels.shape
    pairs = [[(t - 1 if shift else t, int(labels[i, t])) for t in range(int(shift), length)] for i in range(n)]
    kept = [[(place, label) for place, label in row if label != IGNORED] for row in pairs]
    tokens = sum(len(row) for row in kept)
    losses = []
    for i, row in enumerate(kept):
        total = logits.sum() * 0
        for place, label in row:
            logs = logits[i, place].log_softmax(0)
            total = total - (1 - epsilon) * logs[label] - epsilon * logs.mean()
        losses.append(total * n / tokens)
    return torch.stack(losses)


@pytest.mark.parametrize(("shift", "epsilon"), [(True, 0.0), (False, 0.0), (True, 0.1)])
def test_the_kernel_of_sequence_losses_is_that_of_sums_over_tokens(shift: bool, epsilon: float) -> None:
    model, tokens, labels = _talk()
    loss = token_cross_entropy(shift=shift, label_smoothing=epsilon)
    wanted = double_loop(rows(model, _twin(model(tokens), labels, shift, epsilon)[:, None]))[:, 0, :, 0]
    for engine in ("auto", "rows", "reference"):
        found = ntk.empirical_ntk(model, tokens, outputs="loss", targets=labels, loss=loss, engine=engine)
        assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-14), engine


@pytest.mark.parametrize("shift", [True, False])
def test_the_mean_over_sequences_is_the_loss_of_the_batch_and_its_gradient(shift: bool) -> None:
    model, tokens, labels = _talk()
    loss = token_cross_entropy(shift=shift)
    logits = model(tokens)
    batch, single = loss.function(logits, labels), loss.singly(labels)
    mean = torch.stack([single(logits[i : i + 1], labels[i : i + 1]) for i in range(4)]).mean()
    assert mean.item() == pytest.approx(batch.item(), rel=1e-12)
    gradient = torch.autograd.grad(batch, list(model.parameters()))
    kernel = ntk.empirical_ntk(model, tokens, outputs="loss", targets=labels, loss=loss)
    assert kernel.mean() == pytest.approx(sum(float(g.square().sum()) for g in gradient), rel=1e-12)


def test_the_loss_of_a_batch_is_torchs_mean_over_its_tokens() -> None:
    model, tokens, labels = _talk()
    f = model(tokens)
    for epsilon in (0.0, 0.1):
        wanted = F.cross_entropy(f[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=epsilon)
        assert token_cross_entropy(shift=True, label_smoothing=epsilon).value(f, labels) == pytest.approx(wanted.item())


def test_sequences_with_nothing_to_predict_have_no_loss() -> None:
    model, tokens, labels = _talk()
    labels[2] = IGNORED
    loss = token_cross_entropy(shift=True)
    kernel = ntk.empirical_ntk(model, tokens, outputs="loss", targets=labels, loss=loss)
    assert kernel[2].eq(0).all()
    assert kernel.isfinite().all()
    assert loss.value(model(tokens[2:3]), labels[2:3]) == 0


def test_the_cross_kernel_is_normalised_by_the_first_batch() -> None:
    model, tokens, labels = _talk()
    loss = token_cross_entropy(shift=True)
    both: dict[str, Any] = {"outputs": "loss", "loss": loss}
    whole = ntk.empirical_ntk(model, tokens, targets=labels, **both)
    cross = ntk.empirical_ntk(model, tokens, tokens[:2], targets=(labels, labels[:2]), **both)
    assert torch.allclose(cross, whole[:, :2], rtol=1e-12)
