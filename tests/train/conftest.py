"""A run that trains in a second: toy space, synthetic data."""

from __future__ import annotations

import pytest

from lgcnet_fast.config import RunConfig, validate_config
from lgcnet_fast.train.run import Run

CONFIG = {
    "device": "cpu",
    "precision": "fp32",
    "data": {"name": "synthetic", "synthetic_images": 8, "synthetic_size": [48, 96]},
    "space": {"name": "tests.train.toy:ToySpace"},
    "latency": {"size": [49, 97]},
    "search": {
        "epochs": 4,
        "batch_size": 4,
        "augmentation": {"crop": [33, 33], "scale": [0.8, 1.2]},
        "arch_lr": 0.05,
    },
    "pretrain": {
        "epochs": 2,
        "batch_size": 16,
        "image_size": 32,
        "synthetic_images": 32,
        "lr": 0.05,
    },
    "finetune": {
        "epochs": 4,
        "batch_size": 4,
        "lr": 0.05,
        "validate_every": 2,
        "augmentation": {"crop": [33, 65], "scale": [0.8, 1.2]},
    },
    "evaluate": {"size": [49, 97]},
}


def make_config(cache_dir, **changes) -> RunConfig:
    """`CONFIG` with a cache of its own and `section__key=value` changes."""
    values = {key: dict(v) if isinstance(v, dict) else v for key, v in CONFIG.items()}
    values["data"]["cache_dir"] = str(cache_dir)
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (values[section] if section else values)[key] = value
    return validate_config(values, "test")


@pytest.fixture
def new_run(tmp_path, tmp_path_factory):
    """Makes runs: `new_run("name", section__key=value)`."""
    cache = tmp_path_factory.getbasetemp() / "cache"

    def make(name: str = "run", seed: int = 0, **changes) -> Run:
        return Run(tmp_path / name, make_config(cache, **changes), seed)

    return make
