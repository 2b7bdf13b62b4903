"""Kernels of the library's models against plain autograd through the loss that the models compute themselves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import ntk_monitor as ntk
from ntk_monitor.callbacks.huggingface_data import Called, drawn, matched
from ntk_monitor.errors import InputError
from ntk_monitor.losses import IGNORED
from tests.huggingface_runs import VOCABULARY, Labelled, Sentences, bert, flat, gpt2, llama, lora, padded, t5
from tests.reference import ntk as double_loop
from tests.reference import rows
from tests.training import seeded

MODELS: dict[str, Callable[..., nn.Module]] = {"gpt2": gpt2, "llama": llama, "lora": lora, "t5": t5}


def lively(model: nn.Module) -> nn.Module:
    """The model in float64 with weights that matter; LoRA's B, zero at the start, among them."""
    seeded()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad or p.dim() > 1:
                p.add_(0.3 * torch.randn(p.shape))
    return model.double().eval()


def loader(data: Any, collate: Any = padded) -> Any:
    return torch.utils.data.DataLoader(data, batch_size=4, collate_fn=collate)


def told(model: Any, items: list[dict[str, Tensor]]) -> Tensor:
    """Losses of sequences, each alone and unpadded, summed over its tokens, as the model computes them.

    Most models compute losses in float32, whatever the precision of their parameters.
    """
    shifted = 0 if model.config.is_encoder_decoder else 1
    tokens = sum(int((item["labels"][shifted:] != IGNORED).sum()) for item in items)
    losses = []
    for item in items:
        kept = int((item["labels"][shifted:] != IGNORED).sum())
        one = model(input_ids=item["input_ids"][None], labels=item["labels"][None]).loss  # a mean over its own tokens
        losses.append(one * kept * len(items) / tokens)
    return torch.stack(losses)


@pytest.mark.parametrize("name", MODELS)
def test_the_kernel_is_that_of_the_models_own_loss(name: str) -> None:
    model, data = lively(MODELS[name]()), Sentences(6)
    probe = drawn(loader(data), model, 4, Called(), 0)
    matching = matched(model, probe, Called(), None)
    assert matching.match is not None
    assert matching.status == "matched"
    found = ntk.empirical_ntk(
        model, probe.inputs, outputs="loss", targets=probe.targets, loss=matching.match, forward=Called()
    )
    wanted = double_loop(rows(model, told(model, [data[i] for i in probe.indices])[:, None]))[:, 0, :, 0]
    assert torch.allclose(found, wanted, rtol=0, atol=1e-6 * float(wanted.max()))


def test_packed_documents_are_measured_one_by_one() -> None:
    model, data = lively(llama(use_cache=False)), Sentences(6)
    probe = drawn(loader(data, flat), model, 4, Called(), 0)
    assert probe.samples == 4
    assert len(probe.indices) == 4
    loss = matched(model, probe, Called(), None).match
    found = ntk.empirical_ntk(model, probe.inputs, outputs="loss", targets=probe.targets, loss=loss, forward=Called())
    wanted = double_loop(rows(model, told(model, [data[i] for i in probe.indices])[:, None]))[:, 0, :, 0]
    assert torch.allclose(found, wanted, rtol=0, atol=1e-6 * float(wanted.max()))


def test_packed_documents_that_see_each_other_are_refused() -> None:
    model = lively(llama(use_cache=True))  # with a cache the library does not look for boundaries
    with pytest.raises(InputError, match="documents of a packed row see each other in LlamaForCausalLM"):
        drawn(loader(Sentences(6), flat), model, 4, Called(), 0)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_activation_checkpointing_changes_no_kernel(mode: Any, reentrant: bool) -> None:
    model, data = lively(gpt2(resid_pdrop=0.5, attn_pdrop=0.5)), Sentences(6)
    probe = drawn(loader(data), model, 3, Called(), 0)
    options: dict[str, Any] = {"outputs": "loss", "targets": probe.targets, "loss": "token_cross_entropy"}
    options |= {"forward": Called(), "mode": mode}
    plain = ntk.empirical_ntk(model, probe.inputs, **options)
    _checkpoint(model, reentrant)
    model.train()
    assert torch.equal(ntk.empirical_ntk(model, probe.inputs, **options), plain)
    assert [part.gradient_checkpointing for part in model.transformer.h] == [True, True]  # type: ignore[union-attr]


def _checkpoint(model: Any, reentrant: bool) -> None:
    options = {"use_reentrant": reentrant}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)


def test_mixed_precision_leaves_the_kernel_in_the_precision_of_the_parameters() -> None:
    import accelerate
    from accelerate.state import AcceleratorState

    model, data = lively(gpt2()).float(), Sentences(6)
    probe = drawn(loader(data), model, 3, Called(), 0)
    options: dict[str, Any] = {"outputs": "loss", "targets": probe.targets, "loss": "token_cross_entropy"}
    plain = ntk.empirical_ntk(model, probe.inputs, **options)
    AcceleratorState._reset_state(reset_partial_state=True)  # of Trainers in other tests
    try:
        assert accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model) is model
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    rounded = ntk.empirical_ntk(model, probe.inputs, **options)
    assert not torch.allclose(rounded, plain, rtol=1e-4)  # or this test could not fail
    assert torch.equal(ntk.empirical_ntk(model, probe.inputs, forward=Called(), **options), plain)


@pytest.mark.parametrize(
    ("positions", "shape"), [("last", (3, VOCABULARY)), ((0, -1), (3, 2, VOCABULARY))], ids=["last", "two"]
)
def test_chosen_positions_have_the_kernel_of_their_logits(positions: Any, shape: tuple[int, ...]) -> None:
    model, data = lively(gpt2()), Sentences(6)
    probe = drawn(loader(data), model, 3, Called(), 0)
    found = ntk.empirical_ntk(model, probe.inputs, forward=Called(positions=positions))
    logits = model(**probe.inputs).logits
    lengths = probe.inputs["attention_mask"].sum(1)
    chosen = logits[torch.arange(3), lengths - 1] if positions == "last" else logits[:, [0, -1]]
    assert chosen.shape == shape
    wanted = double_loop(rows(model, chosen.flatten(1))) if positions == "last" else None
    if wanted is not None:
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12 * float(wanted.max()))
    else:
        row: Any = torch.autograd.grad(chosen.flatten(1)[1, 5], list(model.parameters()), allow_unused=True)
        norm = sum(0.0 if g is None else float(g.square().sum()) for g in row)
        assert found[1, 5, 1, 5] == pytest.approx(norm, rel=1e-9)


def test_classifiers_are_matched_by_what_their_labels_are() -> None:
    model = lively(bert())
    probe = drawn(loader(Labelled(12), transformers.default_data_collator), model, 8, Called(), 0)
    matching = matched(model, probe, Called(), None)
    assert matching.match is not None
    assert matching.match.name == "cross_entropy(mean)"
    assert model.config.problem_type is None  # type: ignore[union-attr]


@pytest.mark.parametrize("build", [gpt2, bert], ids=["gpt2", "bert"])
def test_label_smoothing_is_the_trainers(build: Callable[[], nn.Module]) -> None:
    from transformers.trainer_pt_utils import LabelSmoother

    model, text = lively(build()), build is gpt2
    data, collate = (Sentences(8), padded) if text else (Labelled(8), transformers.default_data_collator)
    probe = drawn(loader(data, collate), model, 8, Called(), 0)
    smoother = LabelSmoother(epsilon=0.15)

    def value(outputs: Tensor, labels: Tensor) -> Tensor:
        found: Tensor = smoother({"logits": outputs}, labels, shift_labels=text)
        return found

    value.epsilon = 0.15  # type: ignore[attr-defined]
    matching = matched(model, probe, Called(), value)
    assert matching.match is not None
    assert matching.match.options["label_smoothing"] == 0.15
    assert matching.match.options.get("shift", False) == text
