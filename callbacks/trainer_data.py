"""What a Lightning Trainer knows about data and loss: the probe's samples, the outputs behind the training loss."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ntk_monitor.batch import moved
from ntk_monitor.callbacks.lightning_base import LightningModule, Trainer
from ntk_monitor.errors import InputError
from ntk_monitor.guard import random_state, undisturbed
from ntk_monitor.network import Network
from ntk_monitor.probe import Probe, beside, dataset_of, default_samples, indexable, split
from ntk_monitor.recipe import Recipe
from ntk_monitor.settings import kept, uncompiled
from ntk_monitor.silence import Silence


def measured_module(module: LightningModule) -> nn.Module:
    """Return what to measure: the LightningModule, or its only network when it defines no `forward` of its own.

    Raises:
        InputError: no `forward` and not exactly one child that holds parameters.
    """
    if not type(module).forward.__qualname__.startswith("LightningModule."):
        return module
    children = [child for child in module.children() if any(True for _ in child.parameters())]
    if len(children) != 1:
        raise InputError(
            f"{type(module).__name__} has no forward() and {len(children)} networks inside; define forward(), or pass "
            "forward=callable(module, inputs)"
        )
    return children[0]


def drawn(trainer: Trainer, module: nn.Module, wanted: Any, recipe: Recipe) -> Probe | None:
    """Draw the probe from the training data, or return None when only the training batches themselves can tell.

    Args:
        trainer: in fit, loaders set up.
        module: what is measured, to learn how many outputs a sample has.
        wanted: None, a number of samples, a Probe, or a Dataset or DataLoader to draw from.
        recipe: seed, forward and selection.
    """
    if isinstance(wanted, Probe):
        return wanted
    data = wanted
    if wanted is None or isinstance(wanted, int):
        data = trainer.train_dataloader
        # A hook that changes batches on their way to the device (normalisation on the GPU, say) is part of the data.
        if not isinstance(data, DataLoader) or _transforms(trainer):
            return None
    try:
        first = Probe.of(data, wanted if isinstance(wanted, int) else 2, recipe.seed)
    except Exception:
        if data is not wanted and not indexable(data):
            return None  # a stream that cannot be read a second time: its first training batch will do
        raise
    if isinstance(wanted, int):
        return first
    probe = Probe.of(data, default_samples(outputs_per_sample(module, first, recipe)), recipe.seed)
    # Places in a set that is not trained on say nothing about the training set.
    return probe if dataset_of(data) is dataset_of(trainer.train_dataloader) else replace(probe, indices=())


def reference_samples(trainer: Trainer, probe: Probe, recipe: Recipe) -> Probe | None:
    """Draw training samples that drive forecasts beside the probe's own.

    None where the training data cannot be indexed or taken apart into inputs and targets, and where several optimizers
    take turns (manual optimization) and none was chosen: the steps of each are then no steps of the other.
    """
    data = trainer.train_dataloader
    many = len(trainer.optimizers) > 1 and recipe.optimizer is None
    if recipe.reference == 0 or many or _transforms(trainer):
        return None
    if not (isinstance(data, DataLoader) and indexable(data)):
        return None
    try:
        return beside(data, probe, recipe.reference, recipe.seed + 1)
    except Exception:  # noqa: BLE001 - users' data sets; without forecasts there is still a kernel
        return None


def _transforms(trainer: Trainer) -> bool:
    """True when the module or its data module overrides what happens to a batch between loader and training step."""
    hooks = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    owners = [owner for owner in (trainer.lightning_module, getattr(trainer, "datamodule", None)) if owner is not None]
    return any(not getattr(type(o), hook).__qualname__.startswith("DataHooks.") for o in owners for hook in hooks)


def outputs_per_sample(module: nn.Module, probe: Probe, recipe: Recipe) -> int:
    """Return C, by one forward pass of a probe."""
    # A forward may take gradients itself. It may not talk to other processes: those are not running it.
    with undisturbed(seed=recipe.seed), torch.enable_grad(), Silence():  # type: ignore[no-untyped-call]
        options = {"params": recipe.params, "forward": recipe.forward, "device": recipe.device}
        network = Network.careful(module, probe.inputs, **options)
        return int(network.outputs(network.prepared(probe.inputs)).shape[1])


def training_outputs(trainer: Trainer, module: nn.Module, batch: Any, recipe: Recipe) -> tuple[Tensor, Tensor] | None:
    """Return (outputs, targets) as the coming training step will see them: its mode, its precision, its random numbers.

    None when the batch has no tensor of targets. The random state is put back, so that the step draws the same numbers.
    """
    inputs, targets = split(batch)
    if not isinstance(targets, Tensor):
        return None
    # With gradients enabled: a forward may take some itself (physics-informed residuals).
    with random_state(), kept(), uncompiled(), torch.enable_grad(), trainer.precision_plugin.forward_context():
        # A copy of the parameters: the coming step must be the one that rewrites them, should forward do such a thing.
        network = Network(module, params=recipe.params, forward=recipe.forward, mode="live", detached=True)
        return network.raw(moved(inputs, network.device)).detach().float(), targets.detach().clone()


def returned_loss(trainer: Trainer, outputs: Any) -> float | None:
    """Return the value of the loss that `training_step` returned, or None when it returned none."""
    value = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if not isinstance(value, Tensor) or value.numel() != 1:
        return None
    # Lightning divides the loss by the number of accumulated batches before it hands it to callbacks.
    return float(value) * trainer.accumulate_grad_batches
