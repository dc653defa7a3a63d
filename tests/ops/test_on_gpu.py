"""Both kernel backends on a GPU at sizes of real networks, through the public operations."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from lgcnet_fast import ops
from lgcnet_fast.ops import tuning
from lgcnet_fast.ops.backend import use_backend
from lgcnet_fast.recording import recording

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
BACKENDS = ["triton", "cuda"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def on_gpu() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    yield
    tuning._table.cache_clear()


def feature_map(*shape: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(sum(shape))
    x = torch.randn(shape, device=GPU, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def labels(*shape: int, classes: int) -> Tensor:
    torch.manual_seed(0)
    target = torch.randint(classes, shape, device=GPU)
    target[torch.rand(target.shape, device=GPU) < 0.1] = 255
    return target.to(torch.uint8)


def assert_like_float64(
    operation: Callable, backend: str, maps: list[Tensor], kinks: float = 0.0
) -> None:
    """Values and gradients, within the rounding of the maps' dtype and of float32 sums.

    kinks: share of values that may be off, because rounding moves some across that of a ReLU.
    """
    with use_backend(backend):
        y = operation(maps)
    exact_maps = [x.detach().double().requires_grad_() for x in maps]
    with use_backend("reference"):
        truth = operation(exact_maps)
    torch.manual_seed(1)
    grad = torch.randn_like(y)
    found = (y, *torch.autograd.grad(y, maps, grad))
    expected = (truth, *torch.autograd.grad(truth, exact_maps, grad.double()))
    for ours, true in zip(found, expected, strict=True):
        bound = 2 * torch.finfo(ours.dtype).eps * true.abs() + 1e-5 * true.abs().max()
        if ours.dtype == torch.float16:
            bound += 2**-24
        if ours.dtype != torch.float32:
            # Resized maps are stored once before they are added up.
            bound += torch.finfo(ours.dtype).eps * true.abs().max()
        off = ((ours.double() - true).abs() > bound).double().mean()
        assert off <= kinks


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_resizing(backend: str, dtype: torch.dtype) -> None:
    sizes = [(49, 97), (25, 49), (13, 25)]
    maps = [feature_map(2, 48, *size, dtype=dtype) for size in sizes]
    for operation in (ops.concat_upsample, ops.sum_upsample):
        for size in ((49, 97), (64, 128)):
            assert_like_float64(lambda given, o=operation, s=size: o(given, s), backend, maps)
    tiny = feature_map(2, 19, 1, 1, dtype=dtype)
    assert_like_float64(lambda given: ops.upsample(given[0], (31, 17)), backend, [tiny])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [[(49, 97)] * 3, [(49, 97), (25, 49), (13, 25)]])
def test_convolution_of_a_concatenation(
    backend: str, dtype: torch.dtype, sizes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    maps = [feature_map(2, 48, *size, dtype=dtype) for size in sizes]
    weight = (feature_map(48, 144, 1, 1, dtype=dtype).detach() / 12).requires_grad_()
    assert_like_float64(
        lambda given: ops.concat_upsample_pointwise(given[:-1], (49, 97), given[-1]),
        backend,
        [*maps, weight],
        kinks=1e-3,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy(backend: str, dtype: torch.dtype, weighted: bool) -> None:
    weight = torch.linspace(0.5, 2, 19, device=GPU) if weighted else None
    for size, full in (((64, 128), (256, 512)), ((49, 97), (193, 385))):
        logits, target = feature_map(2, 19, *size, dtype=dtype), labels(2, *full, classes=19)
        assert_like_float64(
            lambda given, t=target: ops.upsample_cross_entropy(given[0], t, weight),
            backend,
            [logits],
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ohem(backend: str, dtype: torch.dtype) -> None:
    logits, target = feature_map(2, 19, 64, 128, dtype=dtype), labels(2, 256, 512, classes=19)
    with use_backend(backend):
        loss = ops.upsample_ohem(logits, target)
    (gradient,) = torch.autograd.grad(loss, logits)
    exact = logits.detach().double().requires_grad_()
    with use_backend("reference"):
        true = ops.upsample_ohem(exact, target)
    (derivative,) = torch.autograd.grad(true, exact)
    assert (loss - true).abs() < 1e-4
    # Rounding may move single pixels across the threshold.
    assert (gradient.double() - derivative).norm() < 0.02 * derivative.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels(backend: str) -> None:
    logits = feature_map(2, 19, 49, 97, dtype=torch.float32)
    with use_backend(backend):
        found = ops.upsample_argmax(logits, (193, 385)).long()
    with use_backend("reference"):
        full = ops.upsample(logits.detach().double(), (193, 385))
    chosen = full.gather(1, found[:, None])[:, 0]
    assert (full.amax(1) - chosen).max() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_captured_step_repeats_the_eager_one(backend: str) -> None:
    logits = feature_map(2, 19, 33, 65, dtype=torch.bfloat16)
    target = labels(2, 129, 257, classes=19)

    def step() -> tuple[Tensor, Tensor]:
        with use_backend(backend):
            loss = ops.upsample_ohem(logits, target)
        return loss, *torch.autograd.grad(loss, logits)

    # What keeps the eager loss keeps its autograd graph too, which ends on the default stream.
    eager = [x.detach().clone() for x in step()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with recording(graph, side):
        captured = [x.detach() for x in step()]
    graph.replay()
    if backend == "triton":
        assert all(torch.equal(*pair) for pair in zip(captured, eager, strict=True))
    else:
        torch.testing.assert_close(captured, eager)


def test_auto_follows_a_table_of_this_gpu(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tuning.table_path
    monkeypatch.setattr(tuning, "table_path", lambda name, folder=tmp_path: own(name, folder))
    tuning._table.cache_clear()
    x = feature_map(1, 8, 5, 5, dtype=torch.float32)
    assert "no tuning table" in ops.explain("upsample", x, (9, 9))["auto"]
    name = torch.cuda.get_device_name()
    key = tuning.shape_key(x.dtype, x.shape, (9, 9))
    tuning.write_table(
        tuning.TuningTable(
            device=name,
            measured={},
            backends={"upsample": "triton"},
            configs={"concat_upsample": {key: {"rows": 2, "block": 512}}},
        ),
        tmp_path,
    )
    assert ops.explain("upsample", x, (9, 9))["auto"] == "triton"
    with warnings.catch_warnings(), use_backend("auto", strict=True):
        warnings.simplefilter("error")
        y = ops.upsample(x, (9, 9))
    torch.testing.assert_close(
        y, torch.nn.functional.interpolate(x, size=(9, 9), mode="bilinear", align_corners=True)
    )
