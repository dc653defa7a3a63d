"""The choice of a backend, with operations of the tests' own."""

from __future__ import annotations

import doctest
import threading
import warnings
from collections.abc import Iterator

import pytest
import torch

from lgcnet_fast.errors import BackendError
from lgcnet_fast.ops import backend, tuning
from lgcnet_fast.ops.backend import (
    Implementation,
    Operation,
    check_backend,
    current_backend,
    explain,
    set_backend,
    suppose,
    use_backend,
)

ON_GPU = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of a test survives it, and every device would do."""
    monkeypatch.setattr(backend, "_operations", dict(backend._operations))
    monkeypatch.setattr(backend, "why_not", lambda name, device: None)
    backend._warn_once.cache_clear()
    yield
    set_backend("auto")


def only_small(x: torch.Tensor) -> str | None:
    return "it takes at most 3 elements" if x.numel() > 3 else None


@pytest.fixture
def double() -> Operation:
    """Tells which implementation ran by the sign or offset of its result."""
    return Operation(
        "double",
        reference=lambda x: 2 * x,
        triton=Implementation(run=lambda x: -2 * x, refuse=only_small),
    )


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the tests' tensors pass for a GPU's."""
    monkeypatch.setattr(backend, "_device_of", lambda arguments: ON_GPU)
    monkeypatch.setattr(tuning, "_device_name", lambda device: "Test GPU")


def table(monkeypatch: pytest.MonkeyPatch, **backends: str) -> None:
    made = tuning.TuningTable(device="Test GPU", measured={}, backends=backends)
    monkeypatch.setattr(tuning, "_table", lambda name: made)


ONE = torch.ones(1)
MANY = torch.ones(9)


def test_auto_runs_the_reference_silently_on_the_cpu(double: Operation) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert double(ONE).item() == 2


def test_a_named_backend_runs_within_its_block_only(double: Operation) -> None:
    with use_backend("triton"):
        assert double(ONE).item() == -2
        with use_backend("reference"):
            assert double(ONE).item() == 2
        assert double(ONE).item() == -2
    assert double(ONE).item() == 2


def test_the_choice_ends_with_a_failing_block() -> None:
    with pytest.raises(KeyError), use_backend("triton"):
        raise KeyError
    assert current_backend().name == "auto"


def test_set_backend_is_process_wide_and_use_backend_is_not(double: Operation) -> None:
    set_backend("triton")
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(double(ONE).item()))
        thread.start()
        thread.join()
    assert seen == [-2]


def test_a_named_backend_that_cannot_serve_says_why(double: Operation) -> None:
    with use_backend("triton"), pytest.raises(BackendError, match="double: it takes at most 3"):
        double(MANY)
    with use_backend("cuda"), pytest.raises(BackendError, match="double has no cuda form"):
        double(ONE)


def test_the_device_is_asked_before_the_operation(
    double: Operation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "why_not", lambda name, device: f"{name} lacks {device}")
    with use_backend("triton"), pytest.raises(BackendError, match="triton lacks cpu"):
        double(MANY)
    with use_backend("reference"):
        assert double(ONE).item() == 2


@pytest.mark.parametrize("name", ["", "Triton", "cublas"])
def test_unknown_backends_are_refused(name: str) -> None:
    for choose in (set_backend, lambda name: use_backend(name).__enter__()):
        with pytest.raises(BackendError, match="write auto, triton, cuda, reference"):
            choose(name)


@pytest.mark.usefixtures("on_gpu")
def test_operations_that_are_tuned_together(monkeypatch: pytest.MonkeyPatch) -> None:
    half = Operation(
        "half", lambda x: x / 2, Implementation(lambda x: -x / 2, only_small), tuned_as="double"
    )
    table(monkeypatch, double="triton")
    assert half(ONE) == -0.5


@pytest.mark.usefixtures("on_gpu")
def test_auto_follows_the_table(double: Operation, monkeypatch: pytest.MonkeyPatch) -> None:
    table(monkeypatch, double="triton")
    assert double(ONE).item() == -2
    table(monkeypatch, double="reference")
    with use_backend("auto", strict=True):
        assert double(ONE).item() == 2


@pytest.mark.usefixtures("on_gpu")
def test_auto_warns_once_for_each_reason(
    double: Operation, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(UserWarning, match=r"no tuning table for Test GPU \(python -m bench.tune"):
        assert double(ONE).item() == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert double(ONE).item() == 2
    table(monkeypatch, double="triton")
    with pytest.warns(UserWarning, match="double: it takes at most 3"):
        assert double(MANY)[0].item() == 2
    table(monkeypatch, other="triton")
    with pytest.warns(UserWarning, match="double is not in the tuning table of Test GPU"):
        double(ONE)


@pytest.mark.usefixtures("on_gpu")
def test_strict_turns_the_warning_into_an_error(double: Operation) -> None:
    with use_backend("auto", strict=True), pytest.raises(BackendError, match="strict_backend"):
        double(ONE)


def test_explain_gives_each_verdict(double: Operation) -> None:
    assert explain("double", MANY) == {
        "triton": "it takes at most 3 elements",
        "cuda": "double has no cuda form",
        "reference": "serves",
        "auto": "reference",
    }
    assert explain("double", [ONE][0])["triton"] == "serves"


@pytest.mark.usefixtures("on_gpu")
def test_explain_neither_warns_nor_raises(double: Operation) -> None:
    with warnings.catch_warnings(), use_backend("auto", strict=True):
        warnings.simplefilter("error")
        assert explain("double", ONE)["auto"].startswith("reference: no tuning table for")


def test_explain_names_the_operations_there_are(double: Operation) -> None:
    with pytest.raises(BackendError, match="unknown operation 'treble'; there are: .*double"):
        explain("treble", ONE)


def test_the_device_is_that_of_the_first_tensor() -> None:
    meta = torch.ones(1, device="meta")
    assert backend._device_of((3, [meta, ONE])).type == "meta"
    assert backend._device_of(([], None, ONE)).type == "cpu"


def test_check_backend_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "why_not", lambda name, device: "too old")
    check_backend("auto", ON_GPU)
    with pytest.raises(BackendError, match="'triton' cannot serve here: too old"):
        check_backend("triton", ON_GPU)


@pytest.mark.usefixtures("on_gpu")
def test_strict_auto_needs_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    check_backend("auto", torch.device("cpu"), strict=True)
    with pytest.raises(BackendError, match="no tuning table for this GPU"):
        check_backend("auto", ON_GPU, strict=True)
    table(monkeypatch, double="triton")
    check_backend("auto", ON_GPU, strict=True)


def test_a_supposed_device_need_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "why_not", lambda name, device: "there is none")
    x = torch.ones(2)
    operation = Operation(
        "test_supposed",
        lambda x: x,
        triton=Implementation(lambda x: x + 1, lambda x: "too small" if len(x) < 2 else None),
    )
    with suppose(torch.device("cuda")), use_backend("triton"):
        assert operation(x).tolist() == [2, 2]
        with pytest.raises(BackendError, match="too small"):
            operation(x[:1])
    with use_backend("triton"), pytest.raises(BackendError, match="there is none"):
        operation(x)


def test_what_compilers_trace_is_the_reference(double: Operation) -> None:
    with use_backend("triton"):
        compiled = torch.compile(double, backend="eager", fullgraph=True)
        assert compiled(ONE).item() == 2
        assert double(ONE).item() == -2


def test_the_example_of_the_documentation() -> None:
    assert doctest.testmod(backend).failed == 0


def test_tensors_without_data_take_the_reference() -> None:
    only_reference = Operation("test_meta", lambda x: x)
    meta = torch.ones(1, device="meta")
    with use_backend("cuda"):
        assert only_reference(meta) is meta
