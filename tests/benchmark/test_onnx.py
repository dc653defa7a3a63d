"""ONNX files in onnxruntime on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("onnxruntime", reason="the extra export is not installed")
pytest.importorskip("onnxscript", reason="the extra export is not installed")

from lgcnet_fast.benchmark.case import Case
from lgcnet_fast.benchmark.onnx import onnx_frame
from lgcnet_fast.benchmark.plain import plain_frame
from lgcnet_fast.errors import ConfigError, DeviceError, ExportError
from tests.benchmark.nets import tiny

CPU = torch.device("cpu")
SIZE = (33, 47)


class Labels(nn.Module):
    """What `lgcnet export --argmax` writes: images as they are to labels."""

    def forward(self, images):
        return images.float().sum(-1).remainder(5).to(torch.uint8)


class TwoInputs(nn.Module):
    def forward(self, a, b):
        return a + b


def write(path, module, *inputs):
    program = torch.onnx.export(module.eval(), inputs, dynamo=True, verbose=False, opset_version=18)
    program.save(path, external_data=False)
    return path


@pytest.fixture(scope="module")
def logits_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    return write(path, tiny(), torch.zeros(1, 3, *SIZE))


@pytest.fixture(scope="module")
def labels_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "labels.onnx"
    return write(path, Labels(), torch.zeros(1, *SIZE, 3, dtype=torch.uint8))


def test_a_model_of_normalised_images_gives_the_labels_of_its_network(logits_file):
    case = Case(SIZE)
    labels, plain = onnx_frame(logits_file, case, CPU)(), plain_frame(tiny(), case, CPU)()
    assert labels.dtype == torch.uint8 and labels.shape == plain.shape
    assert (labels == plain).float().mean() > 0.999


def test_logits_stay_logits_without_upsampling(logits_file):
    assert onnx_frame(logits_file, Case(SIZE, upsample=False), CPU)().shape == (1, 5, 9, 12)


def test_a_model_of_raw_images_gets_them(labels_file):
    case = Case(SIZE)
    labels = onnx_frame(labels_file, case, CPU)()
    assert torch.equal(labels, Labels()(case.images(CPU)))
    with pytest.raises(ConfigError, match="labels.onnx: returns labels.*without --argmax"):
        onnx_frame(labels_file, Case(SIZE, upsample=False), CPU)


@pytest.mark.parametrize("case", [Case((33, 48)), Case(SIZE, batch=2)])
def test_another_size_names_both(logits_file, case):
    with pytest.raises(ConfigError, match=r"takes inputs \(1, 3, 33, 47\), the benchmark has"):
        onnx_frame(logits_file, case, CPU)


def test_broken_files_are_told(tmp_path):
    path = tmp_path / "broken.onnx"
    for content in (b"", b"not a model", b"\x08\x07" * 50):
        path.write_bytes(content)
        with pytest.raises((ExportError, ConfigError), match="broken.onnx"):
            onnx_frame(path, Case(SIZE), CPU)


def test_several_inputs_are_listed(tmp_path):
    path = write(
        tmp_path / "two.onnx", TwoInputs(), torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
    )
    with pytest.raises(ConfigError, match=r"takes a: tensor\(float\).*, b: .*one input is needed"):
        onnx_frame(path, Case(SIZE), CPU)


def test_an_output_that_is_no_map_is_told(tmp_path):
    path = write(tmp_path / "flat.onnx", nn.Flatten(), torch.zeros(1, 3, *SIZE))
    with pytest.raises(ConfigError, match=r"first output has shape \(1, 4653\)"):
        onnx_frame(path, Case(SIZE), CPU)


def test_no_gpu_support_names_the_remedy(logits_file, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(Case, "images", lambda self, device: None)
    with pytest.raises(DeviceError, match="no CUDAExecutionProvider; install onnxruntime-gpu"):
        onnx_frame(logits_file, Case(SIZE), torch.device("cuda"))


def test_without_the_extra_it_is_named(logits_file, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"pip install 'lgcnet_fast\[export\]'"):
        onnx_frame(logits_file, Case(SIZE), CPU)
