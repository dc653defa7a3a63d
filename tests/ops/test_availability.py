"""Which backend serves which device, and how `lgcnet doctor` puts it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
from collections.abc import Iterator

import pytest
import torch

from lgcnet_fast.native import loader
from lgcnet_fast.ops import availability, tuning, verdicts
from lgcnet_fast.ops.availability import why_not

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A GPU that is new enough, with both routes to the CUDA kernels and no tuning table."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.4.0")
    monkeypatch.setattr(loader, "available", lambda: {"prebuilt": "not built", "run time": None})
    monkeypatch.setattr(verdicts, "route_refusal", lambda: None)
    remembered = (
        tuning._device_name,
        availability._too_old,
        availability._has_triton,
        availability._no_compiler,
        availability._outdated,
    )
    for function in remembered:
        function.cache_clear()
    yield monkeypatch
    for function in remembered:
        function.cache_clear()


def test_all_serve_a_new_gpu() -> None:
    assert [why_not(name, GPU) for name in ("triton", "cuda", "reference")] == [None] * 3


def test_the_cpu_has_the_reference_only() -> None:
    assert why_not("reference", CPU) is None
    for name in ("triton", "cuda"):
        assert why_not(name, CPU) == "it needs an NVIDIA GPU, the device is cpu"


def test_the_interpreter_serves_the_cpu(gpu: pytest.MonkeyPatch) -> None:
    gpu.setenv("TRITON_INTERPRET", "1")
    assert why_not("triton", CPU) is None
    assert why_not("triton", torch.device("meta")) is not None


def test_pascal_is_too_old_for_triton(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert why_not("triton", GPU) == "triton needs sm_70 or later, Test GPU is sm_61"
    assert why_not("cuda", GPU) is None


def test_triton_of_torch_2_7_is_refused(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(importlib.metadata, "version", lambda name: "3.3.1")
    reason = "triton 3.3.1 cannot compile all kernels, 3.4 can (it comes with torch 2.8)"
    assert why_not("triton", GPU) == reason


def test_triton_needs_a_c_compiler(gpu: pytest.MonkeyPatch) -> None:
    gpu.delenv("CC")
    gpu.setattr(shutil, "which", lambda name: None)
    assert why_not("triton", GPU) == "triton needs a C compiler (install gcc, or name one in CC)"


def test_triton_must_be_installed(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(importlib.util, "find_spec", lambda name: None)
    assert why_not("triton", GPU) == "triton is not installed (pip install triton)"


def test_every_route_to_the_cuda_kernels_gives_its_reason(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(loader, "available", lambda: {"prebuilt": "not built", "run time": "no CuPy"})
    assert why_not("cuda", GPU) == "prebuilt: not built; run time: no CuPy"


def test_findings_of_a_gpu(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "is_available", lambda: True)
    gpu.setattr(torch.cuda, "device_count", lambda: 1)
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    found = {finding.name: finding for finding in verdicts.backend_findings()}
    assert found["backend triton on cuda:0"].status == "warn"
    assert "sm_61" in found["backend triton on cuda:0"].detail
    assert found["backend cuda on cuda:0"].detail == "serves"
    assert found["backend auto on cuda:0"].remedy == "python -m bench.tune"


def test_findings_name_what_auto_takes(gpu: pytest.MonkeyPatch) -> None:
    table = tuning.TuningTable(device="Test GPU", measured={}, backends={"upsample": "triton"})
    gpu.setattr(tuning, "_table", lambda name: table)
    gpu.setattr(torch.cuda, "is_available", lambda: True)
    gpu.setattr(torch.cuda, "device_count", lambda: 1)
    found = {finding.name: finding for finding in verdicts.backend_findings()}
    assert found["backend auto on cuda:0"].detail == "upsample: triton"


def test_findings_say_what_an_h200_lacks_without_the_extension(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "is_available", lambda: True)
    gpu.setattr(torch.cuda, "device_count", lambda: 1)
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu.setattr(verdicts, "route_refusal", lambda: "no extension was compiled")
    found = verdicts.backend_findings()[-1]
    assert (found.name, found.status) == ("sm_90 kernels on cuda:0", "warn")
    assert found.detail == "no extension was compiled" and "docs/native.md" in found.remedy


def test_findings_without_a_gpu_are_no_complaints(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "is_available", lambda: False)
    assert {finding.status for finding in verdicts.backend_findings()} == {"ok"}
