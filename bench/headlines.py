"""The numbers that stand for whole results files, by the names that the summary has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

Row = Mapping[str, Any]
Entries = dict[str, tuple[float, str]]
"""Name -> value, unit."""

SEARCH = {"stage": "search", "batch": 16, "precision": "bf16", "space": {"widths": [32, 64, 128]}}
FINETUNE = {"stage": "finetune", "batch": 16, "size": [360, 480], "genotype": "reference"}
FRAME = {"batch": 1, "size": [769, 1537], "genotype": "reference", "upsample": True}
OURS = ("ours-auto", "ours-triton", "ours-cuda")
"""Whose times the summary has: the first of these that was measured."""
LEAST_FLOOR_US = 4.0
"""Of depthwise cases that a bar is on: shorter ones are launches rather than bytes."""
L2_BYTES = 60 * 2**20


def training(rows: Iterable[Row]) -> Entries:
    rows = list(rows)
    crop = [row for row in rows if _fits(row, {**SEARCH, "size": [256, 512]})]
    paper = [row for row in rows if _fits(row, {**SEARCH, "size": [769, 769]})]
    finetune = [row for row in rows if _fits(row, FINETUNE)]
    eager = [row for row in crop if row["subject"].startswith("eager")]
    cold = [row for row in crop if row["subject"].endswith(" cold")]
    return _known(
        {
            "search_step_ms": (_ours(crop, "ms"), "ms"),
            "search_step_best_stock_ms": (_least(_stock(crop), "ms"), "ms"),
            "search_step_peak_gib": (_ours(crop, "peak_gib"), "GiB"),
            "search_step_eager_peak_gib": (_least(eager, "peak_gib"), "GiB"),
            "search_step_769_ms": (_ours(paper, "ms"), "ms"),
            "search_step_769_peak_gib": (_ours(paper, "peak_gib"), "GiB"),
            "search_first_step_cold_s": (_least(cold, "first_full_speed_s"), "s"),
            "finetune_step_ms": (_ours(finetune, "ms"), "ms"),
            "finetune_step_best_stock_ms": (_least(_stock(finetune), "ms"), "ms"),
        }
    )


def kernels(rows: Iterable[Row]) -> Entries:
    """The worst of each family, of those cases that the floors are meant for."""
    rows = [row for row in rows if "floor_ratio" in row]

    def worst(*operations: str, fits: Callable[[Row], bool]) -> float | None:
        found = [r["floor_ratio"] for r in rows if r["operation"] in operations and fits(r)]
        return max(found, default=None)

    def long(row: Row) -> bool:
        return row["floor_us"] >= LEAST_FLOOR_US

    def past_cache(row: Row) -> bool:
        return row["bytes"] > L2_BYTES

    sums = [f"mixed sum {part}" for part in ("statistics + sum", "alone", "backward")]
    joins = [f"concatenation {direction}" for direction in ("forward", "backward")]
    ratio = "times the floor of bytes"
    return _known(
        {
            "depthwise_forward_floor_ratio_worst": (worst("depthwise forward", fits=long), ratio),
            "depthwise_backward_floor_ratio_worst": (worst("depthwise backward", fits=long), ratio),
            "mixed_sum_floor_ratio_worst": (worst(*sums, fits=past_cache), ratio),
            "concat_upsample_floor_ratio_worst": (worst(*joins, fits=past_cache), ratio),
        }
    )


def deployed(rows: Iterable[Row]) -> Entries:
    entries: dict[str, tuple[float | None, str]] = {}
    for dtype in ("fp16", "fp32"):
        frames = [r for r in rows if _fits(r, {**FRAME, "dtype": dtype}) and "fps" in r]
        frames = [row for row in frames if row["ours"] in ("auto", "triton")]
        entries[f"deploy_{dtype}_fps"] = (_middle(frames, "ours_fps"), "FPS")
        entries[f"deploy_{dtype}_best_stock_fps"] = (_most(frames, "fps"), "FPS")
        if dtype == "fp16":
            entries["deploy_host_us"] = (_middle(frames, "ours_host_us"), "us")
    return _known(entries)


def latency_check(content: Mapping[str, Any]) -> Entries:
    """Of what `lgcnet lut check` writes."""
    groups = {name: group for name, group in content["summary"].items() if group["networks"]}
    uniform, varied = groups.get("uniform", {}), groups.get("varied light share", {})
    unfitted = [group for name, group in groups.items() if name in ("uniform", "given")]
    return _known(
        {
            "lut_median_error_pct": (uniform.get("median_error_pct"), "%"),
            "lut_worst_error_pct": (
                max((group["worst_error_pct"] for group in unfitted), default=None),
                "%",
            ),
            "lut_rank_correlation": (varied.get("rank_correlation"), "Spearman"),
        }
    )


def latency_table(content: Mapping[str, Any]) -> Entries:
    """Of what `lgcnet lut build --runtime deploy` writes."""
    return {"lut_build_s": (content["fit"]["seconds"], "s")}


def _fits(row: Row, wanted: Mapping[str, Any]) -> bool:
    return all(row.get(key) == value for key, value in wanted.items())


def _stock(rows: Iterable[Row]) -> Iterator[Row]:
    return (row for row in rows if "ours_ms" in row)


def _ours(rows: Iterable[Row], column: str) -> float | None:
    """The median over what was measured beside each stock subject."""
    for subject in OURS:
        found = _middle([r for r in rows if r["subject"] == subject and "ms" in r], column)
        if found is not None:
            return found
    return None


def _values(rows: Iterable[Row], column: str) -> list[float]:
    return sorted(row[column] for row in rows if row.get(column) is not None)


def _least(rows: Iterable[Row], column: str) -> float | None:
    return min(_values(rows, column), default=None)


def _most(rows: Iterable[Row], column: str) -> float | None:
    return max(_values(rows, column), default=None)


def _middle(rows: Iterable[Row], column: str) -> float | None:
    values = _values(rows, column)
    return values[len(values) // 2] if values else None


def _known(entries: Mapping[str, tuple[float | None, str]]) -> Entries:
    return {name: (value, unit) for name, (value, unit) in entries.items() if value is not None}
