"""Where a training step of ours spends its time: its kernels, summed by name.

    python -m bench.profile_step --out FILE
    python -m bench.profile_step --out FILE --stage finetune --size 360x480 --ours ours-cuda

The step is replayed as one CUDA graph: timed as it is, then under torch's profiler. Kernels of
parallel branches overlap, so that their sum may exceed the step.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.device import require_gpu, use_fastest_convolutions
from bench.options import image_size, parser
from bench.results_file import Rows, provenance
from bench.training.case import OURS, Step, TrainingCase
from bench.training.server import STAGES, timed
from lgcnet_fast.train.run import ALGORITHMS, WORKSPACE, WORKSPACE_VARIABLE

WARM_UP, STEPS = 5, 20
SHOWN = 25


def main() -> None:
    options = parser("kernels of a training step")
    options.add_argument("--stage", choices=STAGES, default="search")
    options.add_argument("--ours", choices=OURS, default="ours-triton")
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--size", type=image_size, default=image_size("256x512"))
    options.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="bf16")
    chosen = options.parse_args()
    require_gpu(dry=False)
    use_fastest_convolutions(ALGORITHMS)
    os.environ.setdefault(WORKSPACE_VARIABLE, WORKSPACE)
    about = {"space": {"widths": [32, 64, 128]}} if chosen.stage == "search" else {}
    genotype = "" if chosen.stage == "search" else "reference"
    case = TrainingCase(chosen.batch, chosen.size, chosen.precision, **about, genotype=genotype)
    found = profiled(STAGES[chosen.stage].make_step(chosen.ours, case))
    rows = Rows(chosen.out, provenance(chosen.commit), lambda row: (row["case"], row["subject"]))
    rows.add({"profile": chosen.stage, "case": str(case), "subject": chosen.ours, **found})
    for kernel in found["kernels"][:SHOWN]:
        print(f"{kernel['us']:10.1f} us {kernel['launches']:6d}  {kernel['name'][:100]}")
    print(
        f"{case} {chosen.ours}: {found['ms']:.2f} ms, peak {found['peak_gib']:.2f} GiB, "
        f"{found['launches']} launches of {found['kernel_ms']:.2f} ms"
    )


def profiled(step: Step) -> dict[str, Any]:
    """Milliseconds of the step, GiB, and its kernels, those that take longest first."""
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    ms = 1e3 * timed(step, STEPS)
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    us: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            us[event.name] += event.time_range.elapsed_us()
            launches[event.name] += 1
    return {
        "ms": ms,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "kernel_ms": us.total() / 1e3,
        "launches": launches.total(),
        "kernels": [
            {"name": name, "us": round(time, 1), "launches": launches[name]}
            for name, time in us.most_common()
        ],
    }


if __name__ == "__main__":
    main()
