"""The deploy engine of a trained network against that network, on the images it is scored on.

    python -m bench.deploy_accuracy RUN --out FILE
    python -m bench.deploy_accuracy RUN --out FILE --backend triton --dtype fp16

RUN is the folder of a finetuned run. Its network in plain float32 PyTorch, without TF32, says what
is right: a float32 engine may label no pixel differently on which that network is certain, half
precision may move mIoU by `POINTS`. No times are taken, so that the CPU serves too.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch

from bench.deploy_server import MARGIN, labels_and_certainty
from bench.options import Deadline, parser
from bench.results_file import Rows, provenance
from lgcnet_fast.benchmark.plain import exact_float32
from lgcnet_fast.deploy.blueprint import run_blueprint
from lgcnet_fast.deploy.engine import DTYPES, Engine
from lgcnet_fast.errors import UserError
from lgcnet_fast.ops.backend import BACKENDS, use_backend
from lgcnet_fast.train.evaluate import score
from lgcnet_fast.train.metrics import Confusion
from lgcnet_fast.train.precision import placed
from lgcnet_fast.train.run import Run
from lgcnet_fast.train.sources import eval_loader

PROTOCOL = "full"
"""Engines label whole images, so that they cannot be scored on reduced ones."""
POINTS = 0.1
"""Of mIoU, by which half precision may differ in either direction."""
OUT_OF_TIME = "out of time, not measured"


def main() -> None:
    options = _options()
    deadline = Deadline(options.seconds)
    rows = Rows(options.out, provenance(options.commit), _identity)
    faults = []
    with exact_float32():
        reference = TrainingNetwork(Run.read(options.run))
        for backend, dtype in itertools.product(options.backend, options.dtype):
            fault = OUT_OF_TIME if deadline.over else _measure(reference, backend, dtype, rows)
            if fault is not None:
                faults.append(f"{backend} {dtype}: {fault}")
    if faults:
        raise SystemExit("\n".join(faults))


class TrainingNetwork:
    """What the network of a run says about its evaluation split, to compare engines with.

    Raises `RunError` or `DataError` if the run is not finetuned or its data are missing.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.split = run.config.data.val_split
        self.loader = eval_loader(run, self.split)
        network = placed(run.trained_network(), run.device)
        with use_backend("reference"), torch.inference_mode():
            scores = score(network, self.loader, [PROTOCOL], run.num_classes, run.device)
            self.miou = 100 * scores[PROTOCOL].miou()
            self.outputs = [
                labels_and_certainty(network(images), (labels.shape[1], labels.shape[2]))
                for images, labels, _ in self.loader
            ]

    def compare(self, engine: Engine) -> dict[str, Any]:
        """mIoU in percent, its difference in points, and how many labels differ.

        The engine resizes and normalises the stored images by itself.
        """
        cache, device = self.loader.cache, self.run.device
        confusion = Confusion(self.run.num_classes, device)
        counts = torch.zeros(3, dtype=torch.int64, device=device)
        pixels = 0
        for (_, target, indices), (labels, certain) in zip(self.loader, self.outputs, strict=True):
            found = engine.batch_labels(torch.stack(cache.images(indices)))
            confusion.add(found, target)
            differs = found != labels
            counts += torch.stack([differs.sum(), (differs & certain).sum(), certain.sum()])
            pixels += labels.numel()
        different, different_where_certain, certainly = counts.tolist()
        miou = 100 * confusion.miou()
        return {
            "training_miou": self.miou,
            "miou": miou,
            "difference": miou - self.miou,
            "differs": different / pixels,
            "differs_where_certain": different_where_certain,
            "certain": certainly / pixels,
            "pixels": pixels,
        }


def broken_bar(dtype: str, found: dict[str, Any]) -> str | None:
    """Why an engine that compares like this (see `TrainingNetwork.compare`) is wrong, or None."""
    if dtype == "fp32":
        wrong = found["differs_where_certain"]
        return f"{wrong} labels differ where the margin exceeds {MARGIN:g}" if wrong else None
    difference = found["difference"]
    if abs(difference) <= POINTS:
        return None
    return f"mIoU differs by {difference:+.3f} points, allowed are {POINTS:g}"


def _measure(reference: TrainingNetwork, backend: str, dtype: str, rows: Rows) -> str | None:
    """Adds the row of one engine; says which bar it breaks, or why there is no such engine."""
    run = reference.run
    try:
        engine = Engine(run_blueprint(run.folder), run.device, dtype, backend)
    except UserError as error:
        return str(error)
    found = reference.compare(engine)
    about = {
        "run": run.folder.resolve().name,
        "data": run.config.data.name,
        "split": reference.split,
        "images": len(reference.loader.cache),
        "size": run.config.evaluate.size or "image",
    }
    rows.add({**about, "backend": backend, "dtype": dtype, **found})
    print(
        f"{backend} {dtype}: {found['miou']:.3f} mIoU, training network {reference.miou:.3f} "
        f"({found['difference']:+.3f} points); {found['differs']:.2e} of the labels differ, "
        f"{found['differs_where_certain']} of them where its margin exceeds {MARGIN:g}",
        flush=True,
    )
    return broken_bar(dtype, found)


def _identity(row: dict[str, Any]) -> tuple[str, ...]:
    return row["run"], row["data"], row["backend"], row["dtype"]


def _options() -> argparse.Namespace:
    options = parser("what the deploy engine costs in accuracy")
    options.add_argument("run", type=Path, metavar="RUN", help="folder of a finetuned run")
    options.add_argument("--backend", choices=BACKENDS, nargs="+", default=["triton", "cuda"])
    options.add_argument("--dtype", choices=tuple(DTYPES), nargs="+", default=["fp32", "fp16"])
    return options.parse_args()


if __name__ == "__main__":
    main()
