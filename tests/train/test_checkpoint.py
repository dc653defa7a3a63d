"""Checkpoints: whole or not at all, and every random stream restored."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from lgcnet_fast.errors import RunError
from lgcnet_fast.train import checkpoint
from lgcnet_fast.train.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint


def _parts() -> dict[str, object]:
    model = nn.Linear(3, 2)
    return {"model": model, "optimiser": torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)}


def _step(parts) -> None:
    parts["optimiser"].zero_grad()
    parts["model"](torch.randn(4, 3)).square().sum().backward()
    parts["optimiser"].step()


def test_restores_parameters_momentum_and_random_streams(tmp_path):
    path, noise, parts = tmp_path / "checkpoint.pt", torch.Generator().manual_seed(1), _parts()
    _step(parts)
    save_checkpoint(path, "search", 3, parts, {"noise": noise})
    _step(parts)
    expected = (parts["model"].weight.clone(), torch.rand(2, generator=noise))

    again, fresh = _parts(), torch.Generator()
    torch.manual_seed(99)
    assert load_checkpoint(path, "search", again, {"noise": fresh}) == 3
    _step(again)
    torch.testing.assert_close(again["model"].weight, expected[0], rtol=0, atol=0)
    torch.testing.assert_close(torch.rand(2, generator=fresh), expected[1], rtol=0, atol=0)


@pytest.mark.parametrize("cut", [0, 1, 100, -100])
def test_truncated_file_is_refused(tmp_path, cut):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, "search", 1, _parts(), {})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(RunError, match="damaged or not a checkpoint"):
        read_checkpoint(path, "search")


@pytest.mark.parametrize("content", [b"hello", pickle.dumps({"a": 1}, protocol=2), bytes(4096)])
def test_foreign_file_is_refused(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    with pytest.raises(RunError, match=str(path)):
        read_checkpoint(path, "search")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Touch:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    path = tmp_path / "checkpoint.pt"
    torch.save({"format": Touch()}, path)
    with pytest.raises(RunError):
        read_checkpoint(path, "search")
    assert not (tmp_path / "touched").exists()


def test_other_torch_file_stage_version_and_network_are_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save([1, 2], path)
    with pytest.raises(RunError, match="not a checkpoint of lgcnet_fast"):
        read_checkpoint(path, "search")
    save_checkpoint(path, "pretrain", 1, _parts(), {})
    with pytest.raises(RunError, match="belongs to the stage 'pretrain'"):
        read_checkpoint(path, "search")
    with pytest.raises(RunError, match="does not fit this network"):
        load_checkpoint(path, "pretrain", {"model": nn.Linear(5, 5)}, {})
    with pytest.raises(RunError, match="does not fit this network"):
        load_checkpoint(path, "pretrain", {"other": nn.Linear(3, 2)}, {})


def test_other_version_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, "search", 1, _parts(), {})
    monkeypatch.setattr(checkpoint, "VERSION", 2)
    with pytest.raises(RunError, match="version 1, this program reads 2"):
        read_checkpoint(path, "search")


def test_missing_file_names_the_stage(tmp_path):
    with pytest.raises(RunError, match="run the stage 'search' first"):
        read_checkpoint(tmp_path / "checkpoint.pt", "search")


def test_crash_while_writing_leaves_the_former_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, "search", 1, _parts(), {})

    def torn(state, target):
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, "search", 2, _parts(), {})
    assert read_checkpoint(path, "search")["epochs_done"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
