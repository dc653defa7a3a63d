"""Every script of bench/kernels runs from end to end."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench import tune
from bench.kernels import command, max_pool, native_depthwise, native_upsample, operations
from bench.kernels.depthwise_cases import Case, comparisons, make_inputs, reference
from bench.kernels.resizing_cases import plain
from lgcnet_fast.ops import backend as backends
from lgcnet_fast.ops.backend import use_backend

FAMILIES = (
    "depthwise",
    "depthwise_branches",
    "concat_pointwise",
    "concat_upsample",
    "max_pool",
    "mixed_sum",
    "pointwise_backward",
    "conv3",
    "conv3_backward",
    "products",
    "upsample_loss",
)


def dry_run(family: object, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    monkeypatch.setattr(sys, "argv", ["bench", "--part", "dry", "--out", str(out)])
    monkeypatch.setattr(command, "set_backend", lambda name, strict: None)
    command.main(family)
    return json.loads(out.read_text())["rows"]


@pytest.mark.parametrize("name", FAMILIES)
def test_dry_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = importlib.import_module(f"bench.kernels.{name}").FAMILY
    rows = dry_run(family, tmp_path / "rows.json", monkeypatch)
    assert rows and all(row["ours_us"] > 0 and row["speed_up"] > 0 for row in rows)
    assert {row["stock"] for row in rows} <= set().union(*(r["alternatives_us"] for r in rows))


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.slow)])
def test_dry_run_of_the_operations(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "set_backend", lambda name, strict: None)
    with use_backend(backend, strict=True):
        monkeypatch.setattr(sys, "argv", ["bench", "--part", "dry", "--out", str(tmp_path / "f")])
        command.main(operations.FAMILY)
    rows = json.loads((tmp_path / "f").read_text())["rows"]
    names = {row["operation"].partition(" ")[2] for row in rows}
    leaders = {name for name, one in backends._operations.items() if one.tuned_as == name}
    assert names == leaders - {tune.ENGINE} | {"rectified_convolutions"}


def test_dry_run_of_the_cuda_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels themselves need a GPU: PyTorch stands in for them."""
    if torch.cuda.is_available():
        pytest.skip("the real kernels run here")

    def forward(x, weight, *, dilation, stride, tile=None):
        kernel = weight.to(x.dtype).permute(2, 0, 1).unsqueeze(1)
        y = F.conv2d(x, kernel, None, stride, dilation, dilation, x.shape[1])
        return y.float()

    def backward(x, weight, dy, *, dilation, stride, tile=None):
        leaves = x.float().requires_grad_(), weight.requires_grad_()
        kernel = leaves[1].permute(2, 0, 1).unsqueeze(1)
        y = F.conv2d(leaves[0], kernel, None, stride, dilation, dilation, x.shape[1])
        return torch.autograd.grad(y, leaves, dy.float())

    def concat_backward(grad, channels, sizes):
        maps = [torch.zeros(len(grad), 48, *size, requires_grad=True) for size in sizes]
        y = torch.cat([plain_map(x, grad.shape[2:]) for x in maps], 1)
        return torch.autograd.grad(y, maps, grad.float())

    def plain_map(x, size):
        return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)

    def concat_forward(maps, size):
        return plain(next(native_upsample.cases("dry")), [x.float() for x in maps])

    gate = "bench.kernels.depthwise_cases.gate"
    monkeypatch.setattr(gate, lambda name, result, truth: None)  # bf16 weights are not exact
    monkeypatch.setattr(native_depthwise, "depthwise_forward", forward)
    monkeypatch.setattr(native_depthwise, "depthwise_backward", backward)
    monkeypatch.setattr(native_upsample, "concat_upsample_forward", concat_forward)
    monkeypatch.setattr(native_upsample, "concat_upsample_backward", concat_backward)
    for module in (native_depthwise, native_upsample):
        rows = dry_run(module.FAMILY, tmp_path / f"{module.__name__}.json", monkeypatch)
        assert all(row["ours_us"] > 0 for row in rows if "case" in row)


def test_a_wrong_result_ends_the_run() -> None:
    case = Case((1, 4, 3, 5), (1,), dtype=torch.float32)
    wrong, _ = comparisons(case, lambda case, i: 1.01 * forward_truth(case, i), lambda case, i: ())
    with pytest.raises(SystemExit, match="WRONG RESULT: forward 1x4x3x5"):
        wrong.check(make_inputs(case))
    right, _ = comparisons(case, forward_truth, lambda case, i: ())
    right.check(make_inputs(case))


def forward_truth(case: Case, i) -> torch.Tensor:
    return reference(i.x.double(), i.weights, case).float()


def test_tiles_of_steps_are_left_to_the_tuning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "require_gpu", lambda dry: None)
    monkeypatch.setattr(sys, "argv", ["bench", "--part", "sweep", "--out", str(tmp_path / "f")])
    with pytest.raises(SystemExit, match="max pooling: bench.tune sweeps"):
        command.main(max_pool.FAMILY)


def test_times_without_a_gpu_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(sys, "argv", ["bench", "--out", str(tmp_path / "rows.json")])
    with pytest.raises(SystemExit, match="no CUDA GPU"):
        command.main(native_upsample.FAMILY)
