"""What a Hugging Face Trainer trains on: the probe's samples, how its model is called, and which loss it minimises."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ntk_monitor.batch import take
from ntk_monitor.errors import InputError
from ntk_monitor.guard import undisturbed
from ntk_monitor.losses import Loss, candidates, cross_entropy, token_cross_entropy
from ntk_monitor.matching import Matching
from ntk_monitor.network import Network, call, only_tensor
from ntk_monitor.probe import Probe, dataset_of, default_samples
from ntk_monitor.streams import streaming
from ntk_monitor.text import FLASH, Positions, at, unpacked

# Logits of the whole probe, N·T·V numbers; 1 GiB in float32. Never fewer sequences than 8.
_LOGITS, _FEWEST, _MOST = 2**28, 8, 64

# Batches on which the model's own loss is compared with known ones.
_CHUNKS, _CHUNK = 4, 8


@dataclass(frozen=True)
class Called:
    """Calls a model as the Trainer does, in the precision of its parameters, and returns its logits.

    Attributes:
        forward: the user's own callable (module, inputs); None: keywords from the batch.
        positions: which tokens' logits; None: all of them.
    """

    forward: Callable[..., Any] | None = None
    positions: Positions | None = None

    def __call__(self, module: nn.Module, inputs: Any) -> Any:
        """Return the outputs that are measured."""
        output = (self.forward or call)(as_written(module), inputs)
        if self.positions is None:
            return output
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        return at(only_tensor(output), self.positions, mask)


def as_written(module: nn.Module) -> nn.Module:
    """Undo on a shadow what a Trainer does to the way a model runs: autocast around forward, activation checkpointing.

    The first would round the kernel to three digits. The second computes the same function and saves memory of the
    backward pass, but runs parts of it once more where nobody sees them, with dropout.
    """
    for part in module.modules():
        if (original := part.__dict__.get("_original_forward")) is not None:
            part.__dict__["forward"] = original
        if part.__dict__.get("gradient_checkpointing"):
            part.__dict__["gradient_checkpointing"] = False
    return module


@dataclass
class _Documents:
    """A collator whose packed rows are taken apart into documents."""

    collate: Callable[[list[Any]], Any]
    packed: Any = field(default=None, init=False)

    def __call__(self, items: list[Any]) -> Any:
        batch = self.collate(items)
        documents = unpacked(batch)
        self.packed = None if documents is None else batch
        return batch if documents is None else documents


def drawn(loader: Any, model: nn.Module, wanted: Any, forward: Called, seed: int) -> Probe:
    """Draw the probe.

    Args:
        loader: the Trainer's, whose dataset and collator are used, never its iterator.
        model: measured, to learn how many outputs a sample has.
        wanted: None, a number of samples, or what `Probe.of` takes.
        forward: how the model is called.
        seed: of the draw.

    Raises:
        InputError: data that no sample can be taken from, or rows of packed documents that see each other.
    """
    own = wanted is None or isinstance(wanted, int)
    data = loader if own else wanted
    if dataset_of(data) is None:
        return _whole(model, Probe.of(data, default_samples(1), seed))
    count = wanted if isinstance(wanted, int) else _default(model, _taken(model, data, loader, 2, seed), forward)
    probe = _taken(model, data, loader, count, seed)
    # Places in another set say nothing about the training set, nor do documents about the rows they were packed in.
    places = probe.indices if own and len(probe.indices) == probe.samples else ()
    return replace(probe, indices=places)


def _taken(model: nn.Module, data: Any, loader: Any, samples: int, seed: int) -> Probe:
    collate = getattr(data if isinstance(data, DataLoader) else loader, "collate_fn", None)
    if collate is None or (isinstance(data, DataLoader) and data.batch_size is None and data.batch_sampler is None):
        return _whole(model, Probe.of(data, samples, seed))  # a loader of whole batches
    documents = _Documents(collate)
    sampler = None if streaming(data) else getattr(getattr(data, "batch_sampler", None), "sampler", None)
    whole: DataLoader[Any] = DataLoader(dataset_of(data), 1, sampler=sampler, collate_fn=documents)
    probe = Probe.of(whole, samples, seed)
    if documents.packed is not None and not _alone(model, documents):
        raise InputError(
            f"the documents of a packed row see each other in {type(model).__name__}, so that a row is no set of "
            "samples; use an attention implementation that reads position_ids, or pass probe=(inputs, labels)"
        )
    return _whole(model, probe)


def _whole(model: nn.Module, probe: Probe) -> Probe:
    """Return the probe with its inputs named, and its labels among them where a decoder's inputs are made of these."""
    inputs, made = probe.inputs, ("labels", "decoder_input_ids", "decoder_inputs_embeds")
    if isinstance(inputs, Tensor):
        inputs = {getattr(model, "main_input_name", "input_ids"): inputs}
    translates = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if translates and isinstance(inputs, Mapping) and probe.targets is not None and not {*made} & {*inputs}:
        inputs = {**inputs, "labels": probe.targets}
    return Probe(inputs, probe.targets, probe.source, probe.indices)


def _default(model: nn.Module, probe: Probe, forward: Called) -> int:
    """Return how many samples to draw: fewer sequences where their logits are many."""
    outputs = outputs_of(model, probe.inputs, forward)
    if outputs.dim() < 3:
        return default_samples(outputs[0].numel())
    return max(_FEWEST, min(_MOST, _LOGITS // outputs[0].numel()))


def _alone(model: nn.Module, documents: _Documents) -> bool:
    """True when the documents of the last batch have the same outputs in a packed row as on their own."""
    alone = unpacked(documents.packed) or {}
    rows, parts = ({k: v for k, v in b.items() if k not in ("labels", *FLASH)} for b in (documents.packed, alone))
    together = outputs_of(model, rows, Called()).flatten(0, 1)
    apart = outputs_of(model, parts, Called())[alone["attention_mask"].bool()]
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
    # Two samples at least, be it one of them twice: of a single one, mean and sum are the same.
    width = min(_CHUNK, max(2, probe.samples // _CHUNKS))
    for chunk in range(_CHUNKS):
        rows = [(chunk * width + row) % probe.samples for row in range(width)]
        inputs, labels = take(probe.inputs, rows), take(probe.targets, rows)
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
        output = (forward.forward or call)(as_written(module), batch)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if isinstance(loss, Tensor):
            told.append(loss.detach())
        return output

    batch = {**inputs, "labels": labels}
    with undisturbed(seed=0):
        network = Network.careful(model, batch, forward=both)
        outputs = network.raw(network.prepared(batch)).detach()
    return outputs, float(told[-1]) if told else None
