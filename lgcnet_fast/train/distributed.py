"""Several processes under torchrun: one process a device, gradients averaged over them.

Without torchrun everything here is the identity. Only rank 0 writes files.
"""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lgcnet_fast.errors import ConfigError


@dataclass(frozen=True)
class Ranks:
    """This process among all: `rank` of `world`, using the host's device number `local`."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, batch_size: int, key: str) -> int:
        """This rank's part of a batch; raises `ConfigError` naming `key` if it cannot be split."""
        if batch_size % self.world:
            raise ConfigError(
                f"{key} = {batch_size} cannot be split over {self.world} processes; "
                f"use a multiple of {self.world}"
            )
        return batch_size // self.world


def join() -> Ranks:
    """Joins the process group that torchrun describes; alone if it describes none."""
    if "WORLD_SIZE" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        return Ranks()
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


def leave() -> None:
    """Ends the process group that `join` made, once its networks are no longer used.

    Threads of a group that lives until the interpreter ends abort the process. Networks made by
    `parallel` keep the group alive and lie in reference cycles, hence the collection.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def parallel(model: nn.Module, ranks: Ranks, device: torch.device, sync_bn: bool) -> nn.Module:
    """`model` with averaged gradients and, with `sync_bn`, batch statistics over all ranks.

    SyncBatchNorm exists on CUDA only; elsewhere each rank keeps its own batch statistics.
    """
    if ranks.world == 1:
        return model
    if sync_bn and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    devices = [device] if device.type == "cuda" else None
    # A derived network may hold operations that no output depends on.
    return DistributedDataParallel(model, device_ids=devices, find_unused_parameters=True)


def barrier(ranks: Ranks) -> None:
    """Waits until every rank is here, so that files of rank 0 are complete."""
    if ranks.world > 1:
        dist.barrier()
