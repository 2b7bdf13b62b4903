"""The work of a command shared by several processes, as Lightning Fabric starts them."""

import os
from collections.abc import Callable
from typing import Any

from ntk_monitor.errors import InputError


def shared(options: dict[str, Any], work: Callable[..., int]) -> int:
    """Start the processes, unless torchrun or SLURM did, and do the share of this one; returns its exit code.

    Raises:
        InputError: devices or a strategy that Fabric does not have here.
    """
    import lightning.fabric as fabric

    try:
        crew = fabric.Fabric(
            accelerator="auto",
            devices=int(os.environ.get("LOCAL_WORLD_SIZE", options["devices"])),  # torchrun's own number
            num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", options["num_nodes"])),
            strategy=options["strategy"],
        )
        crew.launch()
    except (ValueError, RuntimeError) as error:
        raise InputError(f"these processes cannot be started: {str(error).splitlines()[0]}") from error
    try:
        # On several GPUs each process has one of its own.
        mine = options | ({"device": str(crew.device)} if options["device"] == "auto" else {})
        return work(mine, crew.global_rank, crew.world_size, crew.barrier)
    finally:
        import torch.distributed as distributed

        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
