"""Devices and findings, on machines that monkeypatching pretends."""

import pytest
import torch

from lgcnet_fast import doctor, stack
from lgcnet_fast.doctor import check_device, diagnose, is_supported
from lgcnet_fast.errors import DeviceError

NO_GPU = stack.Listing(())
HOPPER = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.fixture
def machine(monkeypatch):
    """Pretends GPUs of the given capabilities, or none, and what nvidia-smi lists."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def pretend(capabilities=(), architectures=HOPPER, listing=NO_GPU, cuda="13.0"):
        count = len(capabilities)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU {i}")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(architectures))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (10**11, 10**11))
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(stack, "list_gpus", lambda: listing)

    return pretend


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((6, 1), ["sm_60", "sm_70"], True),
        ((6, 0), ["sm_61"], False),
        ((6, 1), HOPPER, False),
        ((7, 0), HOPPER, False),
        ((8, 9), ["sm_80"], True),
        ((9, 0), ["sm_80"], False),
        ((9, 0), ["sm_80", "compute_80"], True),
        ((7, 5), ["compute_80"], False),
        ((12, 1), HOPPER, True),
        ((10, 3), ["sm_100a"], False),
        ((10, 0), ["sm_100a"], True),
        ((10, 3), ["sm_100f"], True),
        ((9, 0), [], False),
        ((9, 0), ["nonsense"], False),
    ],
)
def test_code_runs_within_a_major_version_and_intermediate_code_on_later_ones(
    capability, architectures, runs
):
    assert is_supported(capability, architectures) is runs


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "cuda:x", "", "CPU", "cuda:0 "])
def test_unknown_names_are_refused(name):
    with pytest.raises(DeviceError, match="write auto, cpu, cuda or cuda:N"):
        check_device(name)


def test_auto_is_the_cpu_only_without_a_gpu(machine):
    machine()
    assert check_device("auto") == torch.device("cpu")
    with pytest.raises(DeviceError, match="no NVIDIA GPU.*set device to cpu"):
        check_device("cuda")


def test_auto_is_the_first_gpu(machine):
    machine([(9, 0), (8, 6)])
    assert check_device("auto") == check_device("cuda") == torch.device("cuda", 0)
    assert check_device("cuda:1") == torch.device("cuda", 1)
    assert check_device("cpu") == torch.device("cpu")
    with pytest.raises(DeviceError, match="there are 2 GPUs"):
        check_device("cuda:2")


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
@pytest.mark.parametrize(
    ("capability", "remedy"), [((6, 1), "torch==2.7.1' 'cupy-cuda12x"), ((7, 0), "torch==2.8.0")]
)
def test_a_gpu_that_torch_has_no_code_for_names_the_stack(machine, name, capability, remedy):
    machine([capability])
    with pytest.raises(DeviceError, match=f"sm_{capability[0]}{capability[1]}.*{remedy}"):
        check_device(name)


@pytest.mark.parametrize(
    ("cuda", "driver", "message"),
    [
        (None, 580, "is a CPU build.*cupy-cuda13x"),
        ("13.0", 550, "driver 550 of H200 is too old for CUDA 13.0.*torch==2.8.0"),
        ("13.0", 580, "CUDA cannot use it; check CUDA_VISIBLE_DEVICES"),
    ],
)
def test_auto_does_not_fall_back_while_a_gpu_is_there(machine, cuda, driver, message):
    machine(cuda=cuda, listing=stack.Listing((stack.Gpu((9, 0), driver, "H200"),)))
    with pytest.raises(DeviceError, match=message):
        check_device("auto")


def test_a_broken_driver_is_not_taken_for_no_gpu(machine):
    machine(listing=stack.Listing((), "Driver/library version mismatch\nmore"))
    with pytest.raises(DeviceError, match="Driver/library version mismatch.*repair"):
        check_device("auto")
    machine(listing=stack.Listing((), "No devices were found"))
    assert check_device("auto") == torch.device("cpu")


def test_gpus_hidden_on_purpose_leave_the_cpu(machine, monkeypatch):
    machine(listing=stack.Listing((stack.Gpu((9, 0), 580, "H200"),)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert check_device("auto") == torch.device("cpu")


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_findings_without_a_gpu(machine, tmp_path):
    machine()
    findings = by_name(diagnose(tmp_path / "not" / "there"))
    assert findings["GPU"].status == "ok" and "CPU" in findings["GPU"].detail
    assert {"Python", "torch", "Triton", "memory", "disk", "tensorboard", "av"} <= findings.keys()
    assert str(tmp_path) in findings["disk"].detail
    assert all(finding.remedy for finding in findings.values() if finding.status != "ok")


def test_findings_name_each_gpu(machine):
    machine([(9, 0), (6, 1)])
    findings = by_name(diagnose())
    assert findings["GPU cuda:0"].status == "ok" and "sm_90" in findings["GPU cuda:0"].detail
    assert findings["GPU cuda:1"].status == "fail"
    assert "torch==2.7.1" in findings["GPU cuda:1"].remedy
    assert "not used" in findings["Triton"].detail


@pytest.mark.parametrize(
    ("version", "status"),
    [("2.7.0", "fail"), ("2.7.1+cu126", "ok"), ("2.13.0+cpu", "ok"), ("2.14.0a0+git1", "warn")],
)
def test_torch_versions(machine, monkeypatch, version, status):
    machine()
    monkeypatch.setattr(torch, "__version__", version)
    assert by_name(diagnose())["torch"].status == status


def test_little_room_is_a_warning(machine, monkeypatch, tmp_path):
    machine()
    monkeypatch.setattr(doctor, "ROOM_GB", 1e9)
    findings = by_name(diagnose(tmp_path))
    assert findings["disk"].status == findings["memory"].status == "warn"
