"""What a Hugging Face Trainer trains on: the probe's samples, how its model is called, and which loss it minimises."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from ntk_monitor.batch import take
from ntk_monitor.errors import InputError
from ntk_monitor.guard import undisturbed
from ntk_monitor.losses import Loss, candidates, cross_entropy, token_cross_entropy
from ntk_monitor.matching import Matching
from ntk_monitor.network import Network, call, only_tensor
from ntk_monitor.probe import Probe, default_samples, draw
from ntk_monitor.text import Positions, at, unpacked

# Logits of the whole probe, N·T·V numbers; 1 GiB in float32. Never fewer sequences than 8.
_LOGITS, _FEWEST, _MOST = 2**28, 8, 64

# Batches on which the model's own loss is compared with known ones.
_CHUNKS, _CHUNK = 4, 8


@dataclass(frozen=True)
class Called:
    """Calls a model as the Trainer does, outside of mixed precision, and returns its logits.

    Attributes:
        forward: the user's own callable (module, inputs); None: keywords from the batch.
        positions: which tokens' logits; None: all of them.
    """

    forward: Callable[..., Any] | None = None
    positions: Positions | None = None

    def __call__(self, module: nn.Module, inputs: Any) -> Any:
        """Return the outputs that are measured."""
        output = (self.forward or call)(full_precision(module), inputs)
        if self.positions is None:
            return output
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        return at(only_tensor(output), self.positions, mask)


def full_precision(module: nn.Module) -> nn.Module:
    """Undo on a shadow what Accelerate does to a model for mixed precision: a forward inside autocast."""
    for part in module.modules():
        if (original := part.__dict__.get("_original_forward")) is not None:
            part.__dict__["forward"] = original
    return module


@dataclass
class _Documents:
    """A collator whose packed rows are taken apart into documents."""

    collate: Callable[[list[Any]], Any]
    packed: Any = field(default=None, init=False)

    def __call__(self, items: list[Any]) -> Any:
        batch = self.collate(items)
        documents = unpacked(batch)
        self.packed = batch if documents is not None else None
        return dict(batch) if documents is None and isinstance(batch, Mapping) else documents or batch


def drawn(loader: Any, model: nn.Module, wanted: Any, forward: Called, seed: int) -> Probe:
    """Draw the probe.

    Args:
        loader: the Trainer's, whose dataset and collator are used, never its iterator.
        model: measured, to learn how many outputs a sample has.
        wanted: None, a number of samples, or what `Probe.of` takes; map-style datasets of any library.
        forward: how the model is called.
        seed: of the draw.

    Raises:
        InputError: data without indices, or rows of packed documents that see each other.
    """
    if isinstance(wanted, Probe) or not (wanted is None or isinstance(wanted, int) or dataset_like(wanted)):
        return _whole(model, Probe.of(wanted, default_samples(1), seed))
    own = wanted is None or isinstance(wanted, int)
    data = getattr(loader, "dataset", None) if own else wanted
    collate = getattr(loader, "collate_fn", None)
    if isinstance(wanted, DataLoader):
        data, collate = wanted.dataset, wanted.collate_fn
    if data is None or isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"):
        raise InputError(
            f"a probe is drawn by index, got a training set {type(data).__name__} without one; pass "
            "probe=(inputs, labels) or a dataset with indices"
        )
    count = wanted if isinstance(wanted, int) else _default(model, _drawn(model, data, 2, seed, collate), forward)
    probe = _drawn(model, data, count, seed, collate)
    return probe if own else replace(probe, indices=())  # places in another set say nothing about the training set


def dataset_like(data: Any) -> bool:
    """True for a loader and for a map-style dataset of any library."""
    if isinstance(data, DataLoader):
        return True
    return not isinstance(data, (tuple, list, Mapping, Tensor)) and hasattr(data, "__getitem__")


def _drawn(model: nn.Module, data: Any, samples: int, seed: int, collate: Any) -> Probe:
    documents = None if collate is None else _Documents(collate)
    probe = draw(data, samples, seed, collate=documents)
    if documents is not None and documents.packed is not None and not _alone(model, documents.packed, probe):
        raise InputError(
            f"the documents of a packed row see each other in {type(model).__name__}, so that a row is no set of "
            "samples; use an attention implementation that reads position_ids, or pass probe=(inputs, labels)"
        )
    return _whole(model, probe)


def _whole(model: nn.Module, probe: Probe) -> Probe:
    """Give an encoder-decoder its labels back, from which it makes the decoder's inputs."""
    config = getattr(model, "config", None)
    inputs, made = probe.inputs, ("labels", "decoder_input_ids", "decoder_inputs_embeds")
    if not getattr(config, "is_encoder_decoder", False) or not isinstance(inputs, Mapping) or {*made} & {*inputs}:
        return probe
    return Probe({**inputs, "labels": probe.targets}, probe.targets, probe.source, probe.indices)


def _default(model: nn.Module, probe: Probe, forward: Called) -> int:
    """Return how many samples to draw: fewer sequences where their logits are many."""
    outputs = outputs_of(model, probe.inputs, forward)
    if outputs.dim() < 3:
        return default_samples(outputs[0].numel())
    return max(_FEWEST, min(_MOST, _LOGITS // outputs[0].numel()))


def _alone(model: nn.Module, packed: Any, probe: Probe) -> bool:
    """True when documents have the same outputs in a packed row as on their own."""
    inputs = {k: v for k, v in packed.items() if k != "labels"}
    together = outputs_of(model, inputs, Called(call)).flatten(0, 1)
    apart = outputs_of(model, probe.inputs, Called(call))[probe.inputs["attention_mask"].bool()]
    return together.shape == apart.shape and bool(torch.allclose(together, apart, rtol=1e-3, atol=1e-4))


def outputs_of(model: nn.Module, inputs: Any, forward: Called) -> Tensor:
    """Return the outputs of one pass, in the shape the model gives them."""
    with undisturbed(seed=0):
        network = Network.careful(model, inputs, forward=forward)
        return network.raw(network.prepared(inputs)).detach()


def matched(model: nn.Module, probe: Probe, forward: Called, smoothing: Callable[..., Tensor] | None) -> Matching:
    """Compare known losses with the loss that the model itself returns for the probe's labels.

    Args:
        model: called with `labels=`, as the Trainer calls it.
        probe: cut into up to four batches.
        forward: how the model is called.
        smoothing: (outputs, labels) → scalar, the Trainer's own label smoothing, used in place of the model's loss.
    """
    epsilon = float(getattr(smoothing, "epsilon", 0.0))
    known: list[Loss] = candidates(model)
    if epsilon:
        known += [token_cross_entropy(shift=shift, label_smoothing=epsilon) for shift in (False, True)]
        known = [loss for loss in known if loss.options.get("label_smoothing") != epsilon or loss.kind == "other"]
        known.append(cross_entropy(label_smoothing=epsilon))
    matching = Matching(known)
    width = max(1, min(_CHUNK, probe.samples // _CHUNKS))
    for first in range(0, min(probe.samples, _CHUNKS * width), width):
        inputs, labels = (take(part, slice(first, first + width)) for part in (probe.inputs, probe.targets))
        outputs, value = _told(model, inputs, labels, forward)
        if smoothing is not None:
            value = float(smoothing(outputs, labels.to(outputs.device)))
        if value is None:
            break
        matching.add(outputs, labels.to(outputs.device), value)
    return matching


def _told(model: nn.Module, inputs: Any, labels: Any, forward: Called) -> tuple[Tensor, float | None]:
    """Return outputs and the model's own loss."""
    told: list[Tensor] = []

    def both(module: nn.Module, batch: Any) -> Any:
        output = (forward.forward or call)(full_precision(module), batch)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if isinstance(loss, Tensor):
            told.append(loss.detach())
        return output

    batch = {**inputs, "labels": labels}
    with undisturbed(seed=0):
        network = Network.careful(model, batch, forward=both)
        outputs = network.raw(network.prepared(batch)).detach()
    return outputs, float(told[-1]) if told else None
