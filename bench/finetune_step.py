"""The step that finetunes a derived network against plain PyTorch.

    python -m bench.finetune_step --out FILE
    python -m bench.finetune_step --out FILE --genotypes random --stock graph-nhwc compiled-nhwc

`random` stands for the ten random genotypes, of which only ratios matter.
"""

from __future__ import annotations

from bench.genotypes import RANDOM, expanded
from bench.training.case import TrainingCase
from bench.training.command import TINY_SPACE, grid, run, training_parser


def main() -> None:
    parser = training_parser("the step of finetuning", batch=16, size="360x480")
    parser.add_argument("--genotypes", nargs="+", default=["reference"])
    parser.add_argument("--loss", choices=("cross_entropy", "ohem"), default="cross_entropy")
    options = parser.parse_args()
    space = TINY_SPACE if options.dry else {}
    names = [RANDOM[0]] if options.dry else expanded(options.genotypes)
    cases = [
        TrainingCase(batch, size, options.precision, space, name, options.loss)
        for name in names
        for batch, size in grid(options)
    ]
    run("finetune", options, cases)


if __name__ == "__main__":
    main()
