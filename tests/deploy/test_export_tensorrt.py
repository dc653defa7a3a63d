"""TensorRT: the command for other machines, and what the builder is told. Needs no TensorRT."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lgcnet_fast.deploy.export_tensorrt import (
    EngineOptions,
    build_engine,
    image_shapes,
    missing_to_build,
    trtexec_command,
)
from lgcnet_fast.errors import ExportError

MODEL = Path("m.onnx")
IMAGES = [torch.full((1, 64, 96, 3), value, dtype=torch.uint8) for value in (1, 2)]


def words(dynamic: bool, **options: object) -> list[str]:
    return shlex.split(
        trtexec_command(MODEL, Path("my engine"), (64, 96), dynamic, EngineOptions(**options))
    )


def test_the_command_for_a_fixed_size() -> None:
    assert words(False) == ["trtexec", "--onnx=m.onnx", "--saveEngine=my engine"]
    precise = words(False, fp16=True, int8=True, timing_cache=Path("t.cache"))
    assert precise[3:] == ["--fp16", "--int8", "--timingCacheFile=t.cache"]


def test_the_command_for_any_size() -> None:
    assert words(True)[3:] == [
        "--minShapes=image:1x32x48x3",
        "--optShapes=image:1x64x96x3",
        "--maxShapes=image:1x128x192x3",
    ]


def test_shapes_stay_in_the_range_of_the_model() -> None:
    smallest, usual, largest = image_shapes((40, 16000), dynamic=True)
    assert smallest == (1, 32, 8000, 3)
    assert usual == (1, 40, 16000, 3)
    assert largest == (1, 80, 16384, 3)


# -- building, with a stand-in that records what it is told ----------------------------------------


class Recorder:
    """Stands in for the module tensorrt, its builder, parser and configuration."""

    __version__ = "10.9.0"
    ERROR = FP16 = "FP16"
    INT8 = "INT8"
    IInt8EntropyCalibrator2 = object

    def __init__(self) -> None:
        self.flags: list[str] = []
        self.parses = self.builds = self.accepts_cache = True
        self.num_errors = 1
        self.int8_calibrator = None
        self.BuilderFlag = self
        self.Logger = type("Logger", (), {"ERROR": 0, "__init__": lambda self, level: None})
        self.Builder = self.OnnxParser = lambda *arguments: self
        self.create_network = self.create_builder_config = lambda *arguments: self
        self.create_optimization_profile = lambda: self

    def parse(self, model: bytes) -> bool:
        self.model = model
        return self.parses

    def get_error(self, index: int) -> str:
        return "unknown operation Foo"

    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        self.shapes = (name, shapes)

    def add_optimization_profile(self, profile: object) -> None: ...

    def set_calibration_profile(self, profile: object) -> None: ...

    def set_flag(self, flag: str) -> None:
        self.flags.append(flag)

    def create_timing_cache(self, stored: bytes) -> bytes:
        self.cache = stored
        return stored

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        return self.accepts_cache

    def get_timing_cache(self) -> SimpleNamespace:
        return SimpleNamespace(serialize=lambda: b"new cache")

    def build_serialized_network(self, network: object, config: object) -> bytes | None:
        return b"engine" if self.builds else None


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Recorder:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "tensorrt", recorder)
    (tmp_path / "m.onnx").write_bytes(b"model")
    monkeypatch.chdir(tmp_path)
    return recorder


def build(**options: object) -> bytes:
    return build_engine(MODEL, (64, 96), False, EngineOptions(**options), IMAGES)


def test_the_builder_gets_model_shapes_and_precision(trt: Recorder) -> None:
    assert build(fp16=True) == b"engine"
    assert trt.model == b"model" and trt.flags == ["FP16"] and trt.int8_calibrator is None
    assert trt.shapes == ("image", 3 * ((1, 64, 96, 3),))


def test_int8_is_calibrated_image_by_image(trt: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    build(int8=True)
    assert trt.flags == ["INT8"]
    calibrator = trt.int8_calibrator
    assert calibrator.get_batch_size() == 1
    batches = [calibrator.get_batch(["image"]) for _ in range(3)]
    assert batches == [[IMAGES[0].data_ptr()], [IMAGES[1].data_ptr()], None]


def test_int8_without_images_is_refused(trt: Recorder) -> None:
    with pytest.raises(ExportError, match="calibrated"):
        build_engine(MODEL, (64, 96), False, EngineOptions(int8=True), [])


def test_the_timing_cache_is_read_and_written(trt: Recorder, tmp_path: Path) -> None:
    cache = tmp_path / "t.cache"
    build(timing_cache=cache)
    assert trt.cache == b"" and cache.read_bytes() == b"new cache"
    build(timing_cache=cache)
    assert trt.cache == b"new cache"
    trt.accepts_cache = False
    with pytest.raises(ExportError, match="t.cache.*another device"):
        build(timing_cache=cache)


def test_what_tensorrt_refuses_is_told(trt: Recorder) -> None:
    trt.builds = False
    with pytest.raises(ExportError, match="could not build"):
        build()
    trt.parses = False
    with pytest.raises(ExportError, match="unknown operation Foo"):
        build()


def test_what_is_missing_is_told(trt: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert missing_to_build() == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "GPU" in missing_to_build()
    trt.__version__ = "11.0.0"
    assert "11.0.0" in missing_to_build()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "lgcnet_fast[tensorrt]" in missing_to_build()
