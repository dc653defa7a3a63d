"""Finished run folders, written by what the stages write them with, without training."""

from __future__ import annotations

from pathlib import Path

import torch

from lgcnet_fast.config import validate_config
from lgcnet_fast.data.classes import CAMVID
from lgcnet_fast.deploy.class_list import ClassList
from lgcnet_fast.space.genotype import save_genotype
from lgcnet_fast.train.run import write_json
from lgcnet_fast.train.weights import save_weights
from tests.deploy.networks import SMALL, small_space, with_statistics

SIZE = (33, 65)


def make_run_folder(folder: Path, size: object = SIZE, **space: object) -> Path:
    """A small network on the CamVid classes."""
    options = SMALL | {"name": "lgcnet"} | space
    values = {"space": options, "evaluate": {"size": size}, "device": "cpu", "precision": "fp32"}
    config = validate_config(values, "test")
    genotype = small_space(**space).random_genotype(torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    network = with_statistics(small_space(**space).build(genotype, len(CAMVID)))
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config.model_dump(mode="json"))
    write_json(folder / "classes.json", ClassList.of(CAMVID).model_dump(mode="json"))
    save_genotype(genotype, folder / "genotype.json")
    save_weights(network, folder / "finetune" / "weights.safetensors")
    return folder
