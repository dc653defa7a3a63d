"""A run folder: the configuration it belongs to, the device it runs on, the stages it has done."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lgcnet_fast
from lgcnet_fast.config import RunConfig
from lgcnet_fast.data.classes import ClassSet
from lgcnet_fast.data.dataset import SegmentationDataset, open_dataset
from lgcnet_fast.deploy.class_list import ClassList
from lgcnet_fast.deploy.run_folder import (
    load_weights,
    read_classes,
    read_config,
    read_genotype,
    read_json,
    weights_path,
)
from lgcnet_fast.doctor import check_device
from lgcnet_fast.errors import RunError
from lgcnet_fast.files import replacing
from lgcnet_fast.ops.backend import check_backend, set_backend
from lgcnet_fast.ops.tuning import table_of
from lgcnet_fast.space.genotype import Genotype
from lgcnet_fast.space.registry import make_space
from lgcnet_fast.train.distributed import barrier, join
from lgcnet_fast.train.precision import resolve_precision

MACHINE_KEYS = frozenset(
    {"device", "cuda_graph", "backend", "strict_backend", "data.cache", "data.cache_dir"}
)
"""Keys that may change when a run continues on another machine."""

PREPARATIONS = frozenset({"config.json", "environment.json", "classes.json", "latency_table.json"})
"""Files that are written before any stage begins."""

RESULT_KEYS = {"derive": ("latency_ms", "fps", "parameters"), "evaluate": ("protocols",)}
"""What the summary reads from the results of stages."""

REDO = "delete it to do its stage again"

ALGORITHMS = 3
"""Of cuDNN, tried for each convolution, in the order of its own guess. Torch tries 10 by itself,
all before the first step is over; the search step was as fast with 3."""

WORKSPACE_VARIABLE, WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":2048:1"
"""Of cuBLAS: 2 MiB for every stream and thread, unless the user has set it. On GPUs from Hopper on
torch takes 32 by itself, which for the many streams of a captured search step is half a GiB."""

FEW_THREADS = 2
"""Up to so many cores, CPU stages use one thread. The operations of a small network are too short
to share: a second thread that other work keeps from running made a search step 10 times slower.
"""


class Run:
    """One seed of a configuration in one folder.

    Creates the folder or continues in it; raises `RunError` if it belongs to another
    configuration, `ConfigError`, `DeviceError` or `BackendError` if space, device or backend cannot
    be had. The backend is set for the whole process. With
    `only_reading` the folder, and its record of the machine, stay as they are.
    """

    def __init__(
        self, folder: Path, config: RunConfig, seed: int, only_reading: bool = False
    ) -> None:
        self.folder = folder
        self.config = config.model_copy(update={"seeds": (seed,)})
        self.seed = seed
        self.ranks = join()
        self.space = make_space(config.space)
        self.device = self._own_device()
        self.precision = resolve_precision(config.precision, self.device)
        check_backend(config.backend, self.device, config.strict_backend)
        set_backend(config.backend, config.strict_backend)
        _prepare(self.device)
        if self.ranks.first and not only_reading:
            self._claim_folder()
        barrier(self.ranks)

    @classmethod
    def open(cls, folder: Path) -> Run:
        """Continues in an existing folder with the configuration stored there."""
        config = read_config(folder)
        return cls(folder, config, config.seeds[0])

    @classmethod
    def read(cls, folder: Path, device: str | None = None, backend: str = "auto") -> Run:
        """A finished run to predict with, on `device` or on that of its configuration.

        The backend that trained it may not exist here.
        """
        config = read_config(folder)
        config = config.model_copy(update={"backend": backend, "strict_backend": False})
        if device is not None:
            config = config.model_copy(update={"device": device})
        return cls(folder, config, config.seeds[0], only_reading=True)

    # -- data -------------------------------------------------------------------------------

    def dataset(self, split: str) -> SegmentationDataset:
        return open_dataset(self.config.data, split)

    @cached_property
    def classes(self) -> ClassSet:
        """Those of the data set, recorded in the folder: predicting needs no data set."""
        path = self.folder / "classes.json"
        if path.exists():
            return read_classes(self.folder)
        classes = self.dataset(self.config.data.val_split).classes
        if self.ranks.first:
            write_json(path, ClassList.of(classes).model_dump(mode="json"))
        return classes

    @property
    def num_classes(self) -> int:
        return len(self.classes.names)

    # -- files ------------------------------------------------------------------------------

    def stage_folder(self, stage: str) -> Path:
        return self.folder / stage

    def checkpoint_path(self, stage: str) -> Path:
        return self.folder / stage / "checkpoint.pt"

    def weights_path(self, stage: str) -> Path:
        return weights_path(self.folder, stage)

    @property
    def genotype_path(self) -> Path:
        return self.folder / "genotype.json"

    @property
    def latency_table_path(self) -> Path:
        return self.folder / "latency_table.json"

    @property
    def evaluation_path(self) -> Path:
        return self.folder / "evaluation.json"

    def genotype(self) -> Genotype:
        """The genotype of this run; raises `RunError` if it is not derived yet."""
        return read_genotype(self.folder)

    def trained_network(self) -> nn.Module:
        """The derived network with its finetuned weights, on the CPU, in eval mode.

        Raises `RunError` if there is none.
        """
        network = self.space.build(self.genotype(), self.num_classes)
        load_weights(network, self.weights_path("finetune"))
        return network.eval()

    # -- stages -----------------------------------------------------------------------------

    def stage_result(self, stage: str) -> dict[str, Any] | None:
        """Headline numbers of a finished stage; None while it is unfinished.

        Raises `RunError` if the file is damaged.
        """
        path = self._result_path(stage)
        if not path.exists():
            return None
        result = read_json(path, REDO)
        missing = [key for key in RESULT_KEYS.get(stage, ()) if key not in result]
        if missing:
            raise RunError(f"{path}: lacks {missing[0]!r}; {REDO}")
        return result

    def stage_done(self, stage: str) -> bool:
        return self._result_path(stage).exists()

    def finish(self, stage: str, result: dict[str, Any]) -> dict[str, Any]:
        """Marks a stage as complete; returns `result`."""
        if self.ranks.first:
            write_json(self._result_path(stage), result)
        barrier(self.ranks)
        return result

    def _result_path(self, stage: str) -> Path:
        return self.evaluation_path if stage == "evaluate" else self.folder / stage / "done.json"

    def _own_device(self) -> torch.device:
        device = check_device(self.config.device)
        if device.type == "cuda" and self.ranks.world > 1:
            return torch.device("cuda", self.ranks.local)
        return device

    def _claim_folder(self) -> None:
        path = self.folder / "config.json"
        present = {name for name in _entries(self.folder) if name[0] != "."}
        if present and path.name not in present:
            raise RunError(f"{self.folder}: neither empty nor a run folder; choose another folder")
        if present - PREPARATIONS:
            stored = read_config(self.folder)
            for key, before, now in differences(stored, self.config):
                raise RunError(
                    f"{self.folder}: belongs to another configuration: {key} was {before!r} and "
                    f"is now {now!r}; use another run folder, or the former value"
                )
        else:
            # Left by a run that was refused: no reason to insist on its configuration.
            for name in present:
                (self.folder / name).unlink()
            write_json(path, self.config.model_dump(mode="json"))
        write_json(self.folder / "environment.json", self._environment())

    def _environment(self) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        table = table_of(self.device)
        return {
            "lgcnet_fast": lgcnet_fast.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu",
            "processes": self.ranks.world,
            "precision": self.precision,
            "backend": self.config.backend,
            "tuning_table": table.device if table else None,
        }


def _entries(folder: Path) -> list[str]:
    """Names in `folder`, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.listdir(folder)
    except OSError as error:
        raise RunError(
            f"{folder}: cannot be used as run folder ({error.strerror}); choose another with --out"
        ) from None


def _prepare(device: torch.device) -> None:
    if device.type == "cuda":
        os.environ.setdefault(WORKSPACE_VARIABLE, WORKSPACE)  # Read by the first matrix product.
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.benchmark_limit = ALGORITHMS
    elif torch.get_num_threads() <= FEW_THREADS:
        torch.set_num_threads(1)


def differences(before: RunConfig, now: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """Keys whose values differ, in the order of the configuration, without `MACHINE_KEYS`."""
    old = dict(_flatten(before.model_dump(mode="json")))
    new = dict(_flatten(now.model_dump(mode="json")))
    for key in [*new, *(key for key in old if key not in new)]:
        if key not in MACHINE_KEYS and old.get(key) != new.get(key):
            yield key, old.get(key), new.get(key)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def write_json(path: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
