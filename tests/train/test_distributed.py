"""Two processes on one machine: the same networks, noise of their own, one writer."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp

from lgcnet_fast.errors import ConfigError
from lgcnet_fast.nn.cell import DerivedCell
from lgcnet_fast.train.checkpoint import read_checkpoint
from lgcnet_fast.train.distributed import Ranks, leave


def test_batches_must_split_evenly():
    assert Ranks(0, 4).share(16, "search.batch_size") == 4
    with pytest.raises(ConfigError, match="search.batch_size = 6 .* 4 processes"):
        Ranks(0, 4).share(6, "search.batch_size")


CUT = ("none", "skip", "none", "conv3", "none")
"""A cell that does not read its first input, whose preprocessing gets no gradient then."""


def _train_a_network_with_an_unread_input(rank: int) -> None:
    from lgcnet_fast.train.distributed import parallel

    torch.manual_seed(0)
    cell = DerivedCell(4, 4, 2, reduction=False, reduce_first=False, operations=CUT)
    wrapped = parallel(cell, Ranks(rank, 2), torch.device("cpu"), sync_bn=False)
    for _ in range(2):
        x = torch.randn(2, 4, 5, 5)
        wrapped(x, x).square().mean().backward()


def _search(rank: int, port: int, folder: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    from pathlib import Path

    from lgcnet_fast.train.run import Run
    from lgcnet_fast.train.search import search
    from tests.train.conftest import make_config

    torch.set_num_threads(1)
    config = make_config(Path(folder) / "cache", search__epochs=2)
    run = Run(Path(folder) / "run", config, 0)
    captured = {}
    from lgcnet_fast.train import search as module

    build = module._searcher

    def keep(*arguments):
        captured["searcher"] = build(*arguments)
        return captured["searcher"]

    module._searcher = keep
    search(run)
    network = captured["searcher"].network
    state = {"arch": network.arch.state_dict(), "model": network.supernet.state_dict()}
    state["noise"] = torch.rand(3, generator=network.noise)
    torch.save(state, Path(folder) / f"rank-{rank}.pt")
    _train_a_network_with_an_unread_input(rank)
    del network, state
    captured.clear()
    module._searcher = build
    leave()


def test_two_processes_train_together(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_search, args=(port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2))
    for part in ("arch", "model"):
        for name, tensor in first[part].items():
            torch.testing.assert_close(tensor, second[part][name], msg=name)
    assert not torch.equal(first["noise"], second["noise"])
    stored = read_checkpoint(tmp_path / "run" / "search" / "checkpoint.pt", "search")
    assert stored["epochs_done"] == 2
    torch.testing.assert_close(stored["parts"]["arch"], first["arch"])
    assert (tmp_path / "run" / "search" / "done.json").exists()
