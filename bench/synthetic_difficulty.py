"""Is the built-in data hard in the right way?

Trains the reference genotype, and the same genotype with `skip` on every cell edge, for 2,000
steps; the reference should win by 10 points of mIoU and stay under 90.

    python -m bench.synthetic_difficulty --work DIR --out FILE --commit HASH
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.experiment import run_together, score
from bench.results_file import provenance, write_json
from lgcnet_fast.space.genotype import load_genotype, save_genotype

CONFIG = Path(__file__).parent / "configs" / "synthetic_2000.toml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", required=True)
    arguments = parser.parse_args()

    reference = load_genotype("reference")
    skips = reference.model_copy(update={"cells": tuple(("skip",) * 5 for _ in reference.cells)})
    commands = []
    for name, genotype in {"reference": reference, "all_skip": skips}.items():
        path = arguments.work / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_genotype(genotype, path)
        run = arguments.work / name
        commands.append(
            ["lgcnet", "run", str(CONFIG), "--out", str(run), "--set", f"genotype={path}"]
        )
    run_together(commands, arguments.work / "logs")
    scores = {name: score(arguments.work / name) for name in ("reference", "all_skip")}
    difference = scores["reference"]["miou"] - scores["all_skip"]["miou"]
    write_json(
        arguments.out,
        {**provenance(arguments.commit), "steps": 2000, **scores, "difference": difference},
    )
    print(f"reference {scores['reference']['miou']:.2f}, all skip {scores['all_skip']['miou']:.2f}")


if __name__ == "__main__":
    main()
