"""Does the search beat chance at the same predicted latency?

For each search seed: one searched genotype and two random ones whose predicted latency lies within
3 % of it (every tap reachable), all trained with the same recipe, steps and initialisation seed;
the last checkpoint is scored on val. The paired differences are reported with a 90 % interval.

    python -m bench.search_vs_random search CONFIG --data DIR --work DIR --seeds 0 1 2
    python -m bench.search_vs_random train  CONFIG --data DIR --work DIR --seeds 0 1 2
    python -m bench.search_vs_random report CONFIG --work DIR --seeds 0 1 2 --out FILE --commit HASH
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

import torch

from bench.experiment import run_together, score
from bench.results_file import provenance, read_json, update_summary, write_json
from lgcnet_fast.config import load_config
from lgcnet_fast.data.dataset import open_dataset
from lgcnet_fast.latency.build import open_table
from lgcnet_fast.latency.predict import predict_ms
from lgcnet_fast.space.base import LatencyModel, SearchSpace
from lgcnet_fast.space.genotype import Genotype, load_genotype, save_genotype
from lgcnet_fast.space.registry import make_space

RANDOM_NAMES = ("random-0", "random-1")
TOLERANCE = 0.03
DRAWS = 100_000
# Two-sided 90 % quantiles of Student's t by degrees of freedom.
STUDENT_T90 = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 7: 1.895, 9: 1.833, 11: 1.796}


def main() -> None:
    arguments = _parse()
    if arguments.phase == "search":
        _search(arguments)
    elif arguments.phase == "train":
        _train(arguments)
    else:
        _report(arguments)


def _search(arguments: argparse.Namespace) -> None:
    commands = [
        _command("search", arguments, _search_folder(arguments, seed), seed)
        for seed in arguments.seeds
    ]
    run_together(_spread(commands), arguments.work / "logs")
    derive = [["lgcnet", "derive", str(_search_folder(arguments, s))] for s in arguments.seeds]
    run_together(derive, arguments.work / "logs")


def _train(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, overrides=_overrides(arguments))
    space = make_space(config.space)
    classes = len(open_dataset(config.data, config.data.val_split).classes.names)
    latency = config.latency
    table, _ = open_table(latency.table, space, latency.size, classes, torch.device("cpu"))
    model = space.latency_model(table.milliseconds, latency.size, classes)
    commands = []
    for seed in arguments.seeds:
        searched = load_genotype(_search_folder(arguments, seed) / "genotype.json")
        target = predict_ms(space, model, searched)
        generator = torch.Generator().manual_seed(1000 + seed)
        genotypes = {"searched": searched}
        for name in RANDOM_NAMES:
            genotypes[name] = _random_near(space, model, target, generator)
        for name, genotype in genotypes.items():
            path = arguments.work / "genotypes" / f"seed-{seed}-{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_genotype(genotype, path)
            command = _command("run", arguments, _train_folder(arguments, seed, name), seed)
            commands.append([*command, "--genotype", str(path)])
    run_together(_spread(commands), arguments.work / "logs")


def _random_near(
    space: SearchSpace, model: LatencyModel, target: float, generator: torch.Generator
) -> Genotype:
    for _ in range(DRAWS):
        genotype = space.random_genotype(generator)
        if abs(predict_ms(space, model, genotype) / target - 1) <= TOLERANCE:
            return genotype
    raise SystemExit(f"no random genotype within {TOLERANCE:.0%} of {target:.3f} ms in {DRAWS}")


def _report(arguments: argparse.Namespace) -> None:
    names = ("searched", *RANDOM_NAMES)
    earlier = read_json(arguments.earlier) if arguments.earlier else {"seeds": {}, "genotypes": {}}
    seeds = earlier["seeds"] | {
        str(seed): {name: score(_train_folder(arguments, seed, name)) for name in names}
        for seed in arguments.seeds
    }
    genotypes = earlier["genotypes"] | {
        f"seed-{seed}-{name}": read_json(_train_folder(arguments, seed, name) / "genotype.json")
        for seed in arguments.seeds
        for name in names
    }
    rows = list(seeds.values())
    differences = [
        [row["searched"]["miou"] - row[name]["miou"] for name in RANDOM_NAMES] for row in rows
    ]
    by_pair = interval([difference for pair in differences for difference in pair])
    # Two pairs of a seed share their searched network: the seed as the unit is the stricter test.
    by_seed = interval([statistics.fmean(pair) for pair in differences])
    searched = statistics.fmean(row["searched"]["miou"] for row in rows)
    random = statistics.fmean(row[name]["miou"] for row in rows for name in RANDOM_NAMES)
    origin = provenance(arguments.commit)
    write_json(
        arguments.out,
        {
            **origin,
            "seeds": seeds,
            "paired_differences": differences,
            "interval90_by_pair": by_pair,
            "interval90_by_seed": by_seed,
            "beats_chance_by_pair": by_pair[0] > 0,
            "beats_chance_by_seed": by_seed[0] > 0,
            "miou_searched_mean": searched,
            "miou_random_mean": random,
            "genotypes": genotypes,
        },
    )
    update_summary(
        {
            "camvid_val_miou_search_mean": (searched, "% mIoU"),
            "camvid_val_miou_random_mean": (random, "% mIoU"),
            "camvid_val_difference_low": (by_pair[0], "points of mIoU"),
            "camvid_val_difference_low_by_seed": (by_seed[0], "points of mIoU"),
            "camvid_seeds": (len(rows), "seeds"),
        },
        origin,
        arguments.out.parent / "summary.json",
    )
    print(json.dumps({"differences": differences, "by_seed": by_seed, "by_pair": by_pair}))


def interval(values: list[float]) -> tuple[float, float]:
    """90 % confidence interval of the mean of `values` (Student's t)."""
    mean = statistics.fmean(values)
    half = STUDENT_T90[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def _command(stage: str, arguments: argparse.Namespace, run: Path, seed: int) -> list[str]:
    overrides = [*_overrides(arguments), f"seeds=[{seed}]"]
    sets = [part for override in overrides for part in ("--set", override)]
    return ["lgcnet", stage, str(arguments.config), "--out", str(run), *sets]


def _spread(commands: list[list[str]]) -> list[list[str]]:
    """One GPU a command, in turn."""
    gpus = torch.cuda.device_count()
    return [[*c, "--set", f"device=cuda:{i % gpus}"] for i, c in enumerate(commands)]


def _overrides(arguments: argparse.Namespace) -> tuple[str, ...]:
    return (f'data.root="{arguments.data}"', *arguments.set)


def _search_folder(arguments: argparse.Namespace, seed: int) -> Path:
    return arguments.work / "search" / f"seed-{seed}"


def _train_folder(arguments: argparse.Namespace, seed: int, name: str) -> Path:
    return arguments.work / "train" / f"seed-{seed}-{name}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("phase", choices=["search", "train", "report"])
    parser.add_argument("config", type=Path)
    parser.add_argument("--data", type=Path, default=Path("camvid"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--earlier", type=Path, help="results whose seeds count as well")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="unknown")
    return parser.parse_args()


if __name__ == "__main__":
    main()
