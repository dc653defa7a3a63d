"""Exported files: every format, the check that keeps wrong ones from being kept, mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lgcnet_fast import ops
from lgcnet_fast.config import validate_config
from lgcnet_fast.data.classes import CITYSCAPES
from lgcnet_fast.data.normalise import network_input
from lgcnet_fast.deploy import export as module
from lgcnet_fast.deploy import export_onnx, export_torch
from lgcnet_fast.deploy.export import ExportOptions, export
from lgcnet_fast.deploy.export_check import check, real_images
from lgcnet_fast.deploy.export_tensorrt import EngineOptions
from lgcnet_fast.deploy.run_folder import TrainedRun
from lgcnet_fast.errors import ConfigError, ExportError, UserError
from tests.deploy.networks import genotype_of, small_space, trained

DATA = {"name": "synthetic", "synthetic_images": 8, "synthetic_size": [40, 80]}
SIZE = (49, 65)


@pytest.fixture(scope="module")
def run() -> TrainedRun:
    space = small_space(cells=3, reductions=[1, 2])
    genotype = genotype_of(space, fusion="gp2")
    config = validate_config({"data": DATA, "evaluate": {"size": list(SIZE)}}, "test")
    return TrainedRun(config, genotype, CITYSCAPES, trained(space, genotype).float())


def image_of(size: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (1, *size, 3), dtype=torch.uint8, generator=generator)


def logits_of(run: TrainedRun, image: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return run.network(network_input(image, None))


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# -- formats --------------------------------------------------------------------------------------


def test_onnx_is_one_file_of_standard_operations(run: TrainedRun, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    done = export(run, tmp_path / "m.onnx", ExportOptions("onnx"))
    assert files(tmp_path) == {"m.onnx"}
    model = onnx.load(done.path)
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 18)}
    operations = {node.op_type for node in model.graph.node}
    assert {"Conv", "Resize"} <= operations and "BatchNormalization" not in operations
    assert done.size == SIZE and done.agreement.sizes == (SIZE,)
    assert done.agreement.random == 1 and done.agreement.real == 2 and not done.no_real_images
    assert 0 < done.agreement.difference < done.agreement.allowed
    image = image_of(SIZE)
    found = export_onnx.open_onnx(done.path)(image)
    torch.testing.assert_close(found, logits_of(run, image), rtol=1e-4, atol=1e-4)


def test_dynamic_onnx_takes_sizes_that_the_check_did_not_see(
    run: TrainedRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    onnx = pytest.importorskip("onnx")
    options = ExportOptions("onnx", size=(64, 50), dynamic=True, labels=True, opset=20)
    done = export(run, tmp_path / "m.onnx", options)
    assert capfd.readouterr() == ("", "")
    assert done.agreement.random == len(done.agreement.sizes) > 1
    model = onnx.load(done.path)
    assert [entry.version for entry in model.opset_import] == [20]
    shape = model.graph.input[0].type.tensor_type.shape
    assert [dim.dim_param or dim.dim_value for dim in shape.dim] == [1, "height", "width", 3]
    for size in ((33, 95), (128, 32)):
        image = image_of(size)
        agreement = check(run.network, export_onnx.open_onnx(done.path), [size], [image], True)
        assert agreement.difference <= agreement.allowed


@pytest.mark.parametrize("form", ["pt2", "torchscript"])
def test_torch_formats(run: TrainedRun, tmp_path: Path, form: str) -> None:
    done = export(run, tmp_path / "m", ExportOptions(form, dynamic=True))
    assert files(tmp_path) == {"m"}
    load = {"pt2": export_torch.open_pt2, "torchscript": export_torch.open_torchscript}[form]
    image = image_of((71, 98))
    with torch.no_grad():
        found = load(done.path)(image)
    torch.testing.assert_close(found, logits_of(run, image), rtol=1e-4, atol=1e-4)


def test_torchscript_is_bound_to_no_device(run: TrainedRun, tmp_path: Path) -> None:
    done = export(run, tmp_path / "m.pt", ExportOptions("torchscript", dynamic=True, labels=True))
    graph = str(export_torch.open_torchscript(done.path).inlined_graph)
    assert "aten::conv2d" in graph or "aten::_convolution" in graph
    assert 'value="cpu"' not in graph


def test_the_plain_form_is_exported_whatever_the_backend(run: TrainedRun, tmp_path: Path) -> None:
    with ops.use_backend("triton"):
        done = export(run, tmp_path / "m.pt", ExportOptions("torchscript", labels=True))
    graph = str(export_torch.open_torchscript(done.path).inlined_graph)
    assert "aten::upsample_bilinear2d" in graph and "lgcnet_fast::" not in graph


# -- the check ------------------------------------------------------------------------------------


@pytest.fixture
def write_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports that compute with one weight changed."""
    write = export_torch.write_torchscript

    def spoilt(program, example, path) -> None:
        with torch.no_grad():
            program.network.operations["classifier"].bias[0] += 0.5
        write(program, example, path)

    monkeypatch.setattr(export_torch, "write_torchscript", spoilt)


@pytest.mark.parametrize("labels", [False, True])
def test_a_wrong_export_is_refused_and_not_kept(
    run: TrainedRun, tmp_path: Path, write_wrongly: None, labels: bool
) -> None:
    (tmp_path / "m.pt").write_text("former")
    with pytest.raises(ExportError, match="disagrees.*49x65.*largest difference 0.[45]"):
        export(run, tmp_path / "m.pt", ExportOptions("torchscript", labels=labels))
    assert files(tmp_path) == {"m.pt"} and (tmp_path / "m.pt").read_text() == "former"


def test_the_check_finds_shapes_types_classes_and_not_a_number(run: TrainedRun) -> None:
    size = (32, 32)

    def refusal(result: torch.Tensor, labels: bool) -> str:
        with pytest.raises(ExportError) as caught:
            check(run.network, lambda image: result, [size], [], labels)
        return str(caught.value)

    assert "32x32" in refusal(torch.zeros(1, 5, 7, 8), labels=False)
    assert "uint8" in refusal(torch.zeros(1, *size, dtype=torch.int64), labels=True)
    assert "inf" in refusal(torch.full((1, *size), 200, dtype=torch.uint8), labels=True)
    assert "nan" in refusal(torch.full((1, 5, 8, 8), torch.nan), labels=False)


def test_real_images_are_spread_over_val_and_the_sizes() -> None:
    config = validate_config({"data": DATA | {"synthetic_images": 40}}, "test").data
    images, complaint = real_images(config, [(32, 48), (33, 50)], 4)
    assert complaint == ""
    assert [tuple(image.shape) for image in images] == 2 * [(1, 32, 48, 3), (1, 33, 50, 3)]
    assert all(image.dtype == torch.uint8 for image in images)


def test_missing_data_is_named_and_no_obstacle(run: TrainedRun, tmp_path: Path) -> None:
    data = {"name": "camvid", "root": str(tmp_path / "gone")}
    config = validate_config({"data": data, "evaluate": {"size": list(SIZE)}}, "test")
    without = TrainedRun(config, run.genotype, run.classes, run.network)
    done = export(without, tmp_path / "m.pt", ExportOptions("torchscript"))
    assert done.agreement.real == 0 and "gone" in done.no_real_images


# -- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ExportOptions("onyx"), "onnx, torchscript"),
        (ExportOptions("pt2", size=(31, 64)), "31x64.*32 to 16384"),
        (ExportOptions("pt2", size=(64, 16385)), "64x16385"),
        (ExportOptions("pt2", opset=20), "--opset"),
        (ExportOptions("pt2", engine=EngineOptions(fp16=True)), "--format tensorrt"),
        (ExportOptions("onnx", opset=17), "--opset 17.*18"),
        (ExportOptions("onnx", opset=999), "--opset 999"),
        (ExportOptions("tensorrt"), "beside"),
    ],
    ids=str,
)
def test_options_that_cannot_work(
    run: TrainedRun, tmp_path: Path, options: ExportOptions, message: str
) -> None:
    if options.form in ("onnx", "tensorrt"):
        pytest.importorskip("onnx")
    with pytest.raises(ConfigError, match=message):
        export(run, tmp_path / "m.onnx", options)
    assert files(tmp_path) == set()


def test_a_run_without_a_size_needs_one(run: TrainedRun, tmp_path: Path) -> None:
    config = validate_config({"data": DATA, "evaluate": {"size": "image"}}, "test")
    without = TrainedRun(config, run.genotype, run.classes, run.network)
    with pytest.raises(ConfigError, match="--size HxW"):
        export(without, tmp_path / "m.pt", ExportOptions("torchscript"))
    done = export(without, tmp_path / "m.pt", ExportOptions("torchscript", size=(40, 33)))
    assert done.size == (40, 33)


def test_missing_packages_are_named_with_the_extra(
    run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = module.importlib.util.find_spec
    monkeypatch.setattr(
        module.importlib.util,
        "find_spec",
        lambda name, package=None: None if name == "onnxscript" else found(name, package),
    )
    with pytest.raises(UserError, match=r"onnxscript: pip install 'lgcnet_fast\[export\]'"):
        export(run, tmp_path / "m.onnx", ExportOptions("onnx"))


def test_outputs_that_cannot_be_files(run: TrainedRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        export(run, tmp_path, ExportOptions("torchscript"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        export(run, tmp_path / "file" / "m.pt", ExportOptions("torchscript"))
    done = export(run, tmp_path / "new" / "m.pt", ExportOptions("torchscript"))
    assert done.path.is_file()
