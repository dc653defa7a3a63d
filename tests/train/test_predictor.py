"""Engines of trained runs, folded where the space allows it; order and losses of their streams."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lgcnet_fast.data.classes import CAMVID
from lgcnet_fast.deploy.engine import Engine
from lgcnet_fast.errors import ConfigError, RunError
from lgcnet_fast.report.pictures import RGB, Labels
from lgcnet_fast.space.genotype import save_genotype
from lgcnet_fast.train.precision import Precision
from lgcnet_fast.train.predictor import Predictor, UnfoldedEngine
from lgcnet_fast.train.run import Run
from lgcnet_fast.train.weights import save_weights
from tests.deploy.run_folders import SIZE, make_run_folder
from tests.train.toy import ToyGenotype

CPU = Precision("fp32", torch.device("cpu"))


def pictures(*sizes: tuple[int, int]) -> list[RGB]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run.read(make_run_folder(tmp_path_factory.mktemp("runs") / "run"))


# -- engines --------------------------------------------------------------------------------------


def test_the_network_of_a_run_is_folded(trained: Run) -> None:
    predictor = Predictor.open(trained)
    assert isinstance(predictor.engine, Engine) and predictor.classes == CAMVID
    assert predictor.engine.blueprint.size == SIZE
    images = pictures(SIZE, (48, 96), (5, 9))
    expected = UnfoldedEngine.open(trained).stream(images)
    for (key, _, labels), wanted in zip(
        predictor.labelled(enumerate(images)), expected, strict=True
    ):
        assert labels.dtype == np.uint8 and labels.shape == images[key].shape[:2]
        # Folding rounds differently; a tie between two classes may fall the other way.
        assert (labels != wanted).mean() < 1e-2


def test_the_dtype_replaces_the_precision_of_the_run(trained: Run) -> None:
    assert Predictor.open(trained).engine.dtype == torch.float32
    assert Predictor.open(trained, "bf16").engine.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="--dtype int8: must be one of fp32, fp16, bf16"):
        Predictor.open(trained, "int8")


def test_networks_of_other_spaces_stay_as_they_are(new_run) -> None:
    run = new_run()
    genotype = ToyGenotype(ops=("conv3",) * 6)
    save_genotype(genotype, run.genotype_path)
    with pytest.raises(RunError, match="run the stage finetune first"):
        Predictor.open(run)
    network = run.space.build(genotype, run.num_classes)
    save_weights(network, run.weights_path("finetune"))
    predictor = Predictor.open(run)
    assert isinstance(predictor.engine, UnfoldedEngine)
    [(_, _, labels)] = predictor.labelled([("a", *pictures((50, 70)))])
    assert labels.shape == (50, 70) and labels.max() < run.num_classes
    assert Predictor.open(run, "bf16").engine.precision.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="int8"):
        Predictor.open(run, "int8")


class Recorder(nn.Module):
    """Logits of class 1 everywhere; the shapes of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(tuple(x.shape))
        return torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 3, 4)


@pytest.mark.parametrize("own", [(24, 40), (1, 1), (3, 500), (37, 61)])
@pytest.mark.parametrize("size", [None, (17, 33)])
def test_unfolded_labels_have_the_size_of_the_image(
    own: tuple[int, int], size: tuple[int, int] | None
) -> None:
    network = Recorder()
    [labels] = UnfoldedEngine(network, size, CPU).stream(pictures(own))
    assert labels.shape == own and labels.dtype == np.uint8 and (labels == 1).all()
    assert network.seen == [(1, 3, *(size or own))]


def test_unfolded_networks_are_in_eval_mode() -> None:
    assert not UnfoldedEngine(Recorder().train(), None, CPU).network.training


# -- streams --------------------------------------------------------------------------------------


class AheadEngine:
    """As on a GPU: two frames are on their way; those above `most_rows` do not fit.

    The labels of a frame are its first pixel.
    """

    def __init__(self, most_rows: int = 100) -> None:
        self.most_rows = most_rows
        self.streams = 0

    def stream(self, frames: Iterable[RGB]) -> Iterator[Labels]:
        self.streams += 1
        busy: list[RGB] = []
        for frame in frames:
            if len(busy) == 2:
                yield busy.pop(0)[:, :, 0]
            if len(frame) > self.most_rows:
                raise torch.OutOfMemoryError("no memory")
            busy.append(frame)
        yield from (frame[:, :, 0] for frame in busy)


def numbered(rows: Iterable[int]) -> Iterator[tuple[int, RGB]]:
    for number, count in enumerate(rows):
        yield number, np.full((count, 2, 3), number, np.uint8)


@pytest.mark.parametrize(
    "large", [(), (0,), (7,), (3,), (0, 1, 2), (2, 4, 6), (6, 7), tuple(range(8))]
)
def test_what_does_not_fit_takes_no_other_image_with_it(large: tuple[int, ...]) -> None:
    images = numbered(200 if number in large else 5 for number in range(8))
    found = list(Predictor(AheadEngine(), CAMVID).labelled(images))
    assert [key for key, _, _ in found] == list(range(8))
    assert tuple(key for key, _, labels in found if labels is None) == large
    for key, image, labels in found:
        assert image[0, 0, 0] == key
        assert labels is None or (labels.shape == (5, 2) and (labels == key).all())


def test_images_are_streamed_and_few_are_held() -> None:
    drawn = 0

    def counted() -> Iterator[tuple[int, RGB]]:
        nonlocal drawn
        for pair in numbered([4] * 200):
            drawn += 1
            yield pair

    engine = AheadEngine()
    for done, (key, _, _) in enumerate(Predictor(engine, CAMVID).labelled(counted())):
        assert key == done and drawn - done <= 3
    assert (drawn, engine.streams) == (200, 1)


def test_faults_of_the_images_pass_through() -> None:
    def broken() -> Iterator[tuple[int, RGB]]:
        yield from numbered([4] * 3)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(Predictor(AheadEngine(), CAMVID).labelled(broken()))


def test_no_images() -> None:
    assert list(Predictor(AheadEngine(), CAMVID).labelled([])) == []
