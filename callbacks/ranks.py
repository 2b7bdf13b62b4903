"""Which of Lightning's strategies can be measured: one process, DDP and FSDP2; everything else is refused by name."""

from collections.abc import Iterator

from ntk_monitor.callbacks.lightning_base import LightningModule, Trainer

# Classes a strategy may descend from, and what its parameters are then.
_REFUSED = {
    "FSDPStrategy": (
        "FSDPStrategy (FSDP1) keeps parameters in flat shards, which are not those of the module; use "
        "ModelParallelStrategy with fully_shard (FSDP2), or analyse its checkpoints"
    ),
    "DeepSpeedStrategy": (
        "DeepSpeedStrategy keeps parameters and optimizer state in an engine of its own; use DDP or FSDP2, or analyse "
        "its checkpoints"
    ),
    "XLAStrategy": "XLAStrategy runs on devices whose kernels this monitor cannot follow; use CPU or CUDA devices",
    "XLAFSDPStrategy": "XLAFSDPStrategy keeps parameters in shards on XLA devices; use DDP or FSDP2",
}


def refusal(trainer: Trainer, module: LightningModule) -> str:
    """Return why this run cannot be measured, in one sentence, or "" where it can.

    Tensor parallel layers under ModelParallelStrategy are refused where the plain copy is made (`ntk_monitor.shadow`).
    """
    for kind in type(trainer.strategy).__mro__:
        if kind.__name__ in _REFUSED:
            return _REFUSED[kind.__name__]
    if "FullyShardedDataParallel" in _kinds(module):
        return _REFUSED["FSDPStrategy"]
    if "DeepSpeedEngine" in _kinds(module):
        return _REFUSED["DeepSpeedStrategy"]
    return ""


def _kinds(module: LightningModule) -> Iterator[str]:
    return (kind.__name__ for child in module.modules() for kind in type(child).__mro__)
