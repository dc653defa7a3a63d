"""The command line of every family of kernels.

    python -m bench.kernels.FAMILY --out FILE [--part table|full|sweep|dry] [--only TEXT]

Every case is checked against float64 before it is timed. `table` has selected cases and takes
about a minute, `full` has all; `sweep` tries tile sizes of kernels that bench.tune does not tune;
`dry` runs tiny shapes through the interpreter, to see that the script works.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from bench.device import require_gpu, use_fastest_convolutions
from bench.kernels.comparison import Family, Row
from bench.kernels.timing import copy_bandwidth
from bench.options import Deadline, parser
from bench.results_file import Rows, provenance
from lgcnet_fast.ops.backend import BACKENDS, set_backend


def main(family: Family) -> None:
    options = _options(family)
    deadline = Deadline(options.seconds)
    require_gpu(dry=options.part == "dry")
    if options.part == "sweep" and family.swept:
        raise SystemExit(f"{family.name}: bench.tune sweeps the tiles of what a step launches")
    use_fastest_convolutions()
    set_backend(options.backend, strict=True)
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s", flush=True)
    origin = provenance(options.commit) | {"copy_bandwidth": bandwidth}
    rows = Rows(
        options.out, origin, lambda row: (row["operation"], row.get("case", row.get("key")))
    )
    if options.part in ("table", "full", "dry"):
        compare(family, options, rows, deadline, bandwidth)
    if options.part in ("sweep", "dry"):
        for row in sweep(family, options.only, options.part == "dry", deadline, bandwidth):
            rows.add(row)


def _identity(row: Row) -> tuple[str, str]:
    return row["operation"], row.get("case", row.get("key"))


def compare(
    family: Family, options: argparse.Namespace, rows: Rows, deadline: Deadline, bandwidth: float
) -> None:
    chosen = [case for case in family.comparisons(options.part) if options.only in str(case)]
    for done, case in enumerate(chosen):
        if deadline.over:
            print(f"out of time: {len(chosen) - done} of {len(chosen)} cases left out")
            return
        case.verify()
        row = case.measure(bandwidth)
        print_row(row)
        rows.add(row)
    print(f"{len(chosen)} cases, all results right")


def sweep(
    family: Family, only: str, tiny: bool, deadline: Deadline, bandwidth: float
) -> Iterator[Row]:
    for one in family.sweeps(tiny):
        if deadline.over:
            print(f"out of time: sweeps from {one} on left out")
            return
        if only in str(one):
            row = one.measure(bandwidth)
            print_sweep(row)
            yield row


def print_row(row: Row) -> None:
    """One line of the table; times in microseconds."""
    print(
        f"{row['operation']} {row['case']:<50} floor {row['floor_us']:7.1f}  "
        f"ours {row['ours_us']:8.1f} ({row['floor_ratio']:5.1f}x)  "
        f"stock {row['stock_us']:8.1f} {row['stock']:<6} speed-up {row['speed_up']:5.2f}",
        flush=True,
    )


def print_sweep(row: Row) -> None:
    default = "does not run" if row["default_us"] is None else f"{row['default_us']:.1f}"
    print(f"{row['operation']} {row['key']}: floor {row['floor_us']:.1f}, default {default}")
    for config in row["configs"][:3]:
        print(f"    {config['us']:7.1f} {config['config']}", flush=True)
    for name, us in row.get("stock_us", {}).items():
        print(f"    {us:7.1f} {name} of PyTorch", flush=True)


def _options(family: Family) -> argparse.Namespace:
    options = parser(f"{family.name} kernels against PyTorch and the floor of bytes")
    options.add_argument("--part", choices=("table", "full", "sweep", "dry"), default="table")
    options.add_argument("--backend", choices=BACKENDS, default="triton", help="of operations")
    options.add_argument("--only", default="", help="cases whose name contains this")
    return options.parse_args()
