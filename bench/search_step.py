"""The step of the search against plain PyTorch: time, memory, time to the first fast step.

    python -m bench.search_step --out FILE
    python -m bench.search_step --out FILE --first
    python -m bench.search_step --out FILE --stock graph-nhwc --size 256x512 769x769 --batch 4 8 16

The loss and gradients of our step are compared with float64 first. Stock subjects do the same
work with the same optimisers in plain PyTorch, each in a process of its own; a FILE collects the
results of several commands.
"""

from __future__ import annotations

from bench.training.case import TrainingCase
from bench.training.command import TINY_SUPERNET, grid, run, training_parser


def main() -> None:
    parser = training_parser("the step of the search", batch=16, size="256x512")
    parser.add_argument("--widths", type=int, nargs=3, default=[32, 64, 128])
    options = parser.parse_args()
    space = TINY_SUPERNET if options.dry else {"widths": options.widths}
    cases = [TrainingCase(batch, size, options.precision, space) for batch, size in grid(options)]
    run("search", options, cases)


if __name__ == "__main__":
    main()
