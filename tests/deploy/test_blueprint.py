"""Engine files: what is written is read, and what is wrong with a file is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lgcnet_fast.data.classes import CAMVID
from lgcnet_fast.deploy import Segmenter
from lgcnet_fast.deploy.blueprint import _digest
from lgcnet_fast.errors import EngineError, GenotypeError, UserError
from tests.deploy.run_folders import SIZE, make_run_folder
from tests.deploy.test_segmenter import picture


@pytest.fixture
def engine_file(segmenter: Segmenter, tmp_path: Path) -> Path:
    path = tmp_path / "camvid.engine"
    segmenter.save(path)
    return path


def stored_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def rewrite(
    path: Path,
    metadata: dict[str, str] | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
    description: Callable[[dict], object] = lambda values: None,
    right_digest: bool = True,
) -> None:
    """Changes parts of an engine file; None as a value removes the part."""
    stored = stored_metadata(path)
    weights = {k: v for k, v in (load_file(path) | (tensors or {})).items() if v is not None}
    values = json.loads(stored["description"])
    description(values)
    stored["description"] = json.dumps(values)
    if right_digest:
        stored["digest"] = _digest(stored["description"], weights)
    stored = {k: v for k, v in (stored | (metadata or {})).items() if v is not None}
    save_file(weights, path, stored)


@pytest.mark.parametrize(
    "options", [{}, {"fusion": "grid13"}, {"head": "mscell"}, {"name": "gas"}, {"size": "image"}]
)
def test_a_saved_engine_gives_the_same_labels(tmp_path: Path, options: dict) -> None:
    segmenter = Segmenter.load(make_run_folder(tmp_path / "run", **options), device="cpu")
    segmenter.save(str(tmp_path / "a.engine"))
    again = Segmenter.load(tmp_path / "a.engine", device="cpu")
    assert again.size == segmenter.size
    assert again.classes == CAMVID and np.array_equal(again.classes.colours, CAMVID.colours)
    for size in (SIZE, (50, 70)):
        assert np.array_equal(again(picture(size)), segmenter(picture(size)))


def test_saving_from_half_precision_keeps_full_weights(run_folder: Path, tmp_path: Path) -> None:
    for dtype in ("fp32", "fp16"):
        Segmenter.load(run_folder, device="cpu", dtype=dtype).save(tmp_path / dtype)
    Segmenter.load(tmp_path / "fp16", device="cpu").save(tmp_path / "again")
    first = stored_metadata(tmp_path / "fp32")
    assert len(first["digest"]) == 64
    assert stored_metadata(tmp_path / "fp16") == stored_metadata(tmp_path / "again") == first


def test_saving_replaces_a_file_and_leaves_nothing_else(
    segmenter: Segmenter, tmp_path: Path
) -> None:
    (tmp_path / "a.engine").write_text("former")
    segmenter.save(tmp_path / "a.engine")
    assert [path.name for path in tmp_path.iterdir()] == ["a.engine"]
    Segmenter.load(tmp_path / "a.engine", device="cpu")


@pytest.mark.parametrize("place", ["folder", "."])
def test_paths_that_cannot_be_written(segmenter: Segmenter, tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(EngineError, match="cannot be written"):
        segmenter.save(tmp_path / place)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_another_version(engine_file: Path) -> None:
    rewrite(engine_file, metadata={"version": "2"})
    with pytest.raises(EngineError, match=r"camvid\.engine: engine version 2, .* reads 1"):
        Segmenter.load(engine_file)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files(engine_file: Path, share: float) -> None:
    content = engine_file.read_bytes()
    engine_file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(EngineError, match="damaged or not an engine"):
        Segmenter.load(engine_file)


@pytest.mark.parametrize("content", [b"x", b"\xff" * 1000, b'{"a": 1}', b"\0" * 64])
def test_other_files(engine_file: Path, content: bytes) -> None:
    engine_file.write_bytes(content)
    with pytest.raises(EngineError, match="not an engine"):
        Segmenter.load(engine_file)


def test_weights_without_a_description(run_folder: Path) -> None:
    with pytest.raises(EngineError, match="not an engine; give a run folder"):
        Segmenter.load(run_folder / "finetune" / "weights.safetensors")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no such engine file or run folder"):
        Segmenter.load(tmp_path / "missing.engine")


@pytest.mark.parametrize("position", [0.3, 0.6, 0.999])
def test_a_changed_byte(engine_file: Path, position: float) -> None:
    content = bytearray(engine_file.read_bytes())
    content[int(position * len(content))] ^= 1
    engine_file.write_bytes(content)
    # In the header the change may also break its syntax.
    with pytest.raises(EngineError, match="altered|damaged"):
        Segmenter.load(engine_file)


def test_a_changed_description_or_weight(engine_file: Path) -> None:
    def resize(values: dict) -> None:
        values["size"] = [64, 64]

    original = engine_file.read_bytes()
    rewrite(engine_file, description=resize, right_digest=False)
    with pytest.raises(EngineError, match="altered"):
        Segmenter.load(engine_file)
    engine_file.write_bytes(original)
    rewrite(engine_file, tensors={CLASSIFIER: torch.zeros(11)}, right_digest=False)
    with pytest.raises(EngineError, match="altered"):
        Segmenter.load(engine_file)


CLASSIFIER = "operations.classifier.bias"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({CLASSIFIER: torch.zeros(12)}, r"classifier\.bias is torch\.float32 \(12,\).*\(11,\)"),
        ({CLASSIFIER: torch.zeros(11).double()}, r"classifier\.bias is torch\.float64"),
        ({CLASSIFIER: None}, r"lacks 'operations\.classifier\.bias'"),
        ({"operations.more": torch.zeros(1)}, r"no use for 'operations\.more'"),
        ({"operations.stem/conv1.weight": torch.zeros(8, 4, 3, 3)}, r"\(8, 4, 3, 3\)"),
    ],
)
def test_weights_of_another_network(engine_file: Path, tensors: dict, message: str) -> None:
    rewrite(engine_file, tensors=tensors)
    with pytest.raises(EngineError, match=message):
        Segmenter.load(engine_file)


def drop_a_class(values: dict) -> None:
    for key in ("names", "colours", "output_ids"):
        values["classes"][key].pop()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (drop_a_class, EngineError, r"classifier\.(bias|weight)"),
        (lambda values: values["classes"]["names"].pop(), EngineError, "equally long"),
        (lambda values: values.update(size=[0, 4]), EngineError, "size"),
        (lambda values: values.update(more=1), EngineError, "more"),
        (lambda values: values.pop("genotype"), EngineError, "genotype"),
        (lambda values: values["genotype"].update(space="os:path"), GenotypeError, "os:path"),
        (lambda values: values["genotype"]["cells"][0].pop(), GenotypeError, "five|5 edges"),
        (lambda values: values["genotype"]["widths"].reverse(), EngineError, "operations"),
    ],
)
def test_descriptions_that_do_not_fit(
    engine_file: Path, change: Callable, error: type[UserError], message: str
) -> None:
    rewrite(engine_file, description=change)
    with pytest.raises(error, match=f"camvid.engine(.|\n)*({message})"):
        Segmenter.load(engine_file)


@pytest.mark.parametrize("key", ["description", "digest"])
def test_missing_metadata(engine_file: Path, key: str) -> None:
    rewrite(engine_file, metadata={key: None})
    with pytest.raises(EngineError, match=f"lacks its {key}"):
        Segmenter.load(engine_file)
