"""The configuration of a run: one TOML file, a preset below it, overrides above it.

Every section is validated before any work starts; an unknown key is refused with the nearest
valid one. Sizes are (height, width) in pixels.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from importlib import resources
from pathlib import Path
from reprlib import repr as _short
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from lgcnet_fast.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESETS = ("paper", "lite", "smoke")

# Strict: `epochs = true` and `flip = "no"` are mistakes, not numbers and booleans.
Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]
Decay = Annotated[float, Field(strict=True, ge=0, lt=1)]
Positive = Annotated[float, Field(strict=True, gt=0)]
NonNegative = Annotated[float, Field(strict=True, ge=0)]
Switch = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1, le=10**9)]
CountOrZero = Annotated[int, Field(strict=True, ge=0, le=10**9)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Pixels = Annotated[int, Field(strict=True, ge=1, le=16384)]
Size = tuple[Pixels, Pixels]
Scale = Annotated[float, Field(strict=True, ge=0.05, le=20)]
ScaleRange = tuple[Scale, Scale]
Protocol = Literal["full", "bisenet_speed"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(Section):
    """`name`: synthetic, cityscapes, camvid, camvid_original or folder."""

    name: Literal["synthetic", "cityscapes", "camvid", "camvid_original", "folder"] = "synthetic"
    root: Path | None = None
    train_splits: Annotated[tuple[str, ...], Field(min_length=1)] = ("train",)
    val_split: str = "val"
    cache: Literal["auto", "disk", "ram", "gpu"] = "auto"
    cache_dir: Path | None = None
    synthetic_images: Count = 800
    """Training images of the synthetic set; a quarter as many again for val."""
    synthetic_size: Size = (256, 512)
    synthetic_seed: Seed = 0

    @model_validator(mode="after")
    def _root_where_needed(self) -> DataConfig:
        if self.name != "synthetic" and self.root is None:
            raise ValueError(f"data.root is needed for data.name = {self.name!r}")
        return self


class LatencyConfig(Section):
    """`table`: the JSON file of `lgcnet lut build`, the name of a table that comes with the package
    (`lgcnet lut list`), or roofline_titanxp, which needs no GPU."""

    table: str = "roofline_titanxp"
    size: Size = (769, 1537)


class Augmentation(Section):
    crop: Size = (769, 769)
    scale: ScaleRange = (0.5, 2.0)
    flip: Switch = True
    colour: NonNegative = 0.0
    """Strength of brightness, contrast and saturation jitter; 0 is off."""

    @model_validator(mode="after")
    def _ordered(self) -> Augmentation:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale {self.scale} must be (low, high)")
        return self


class SearchConfig(Section):
    """Section 5 of the paper; the defaults are its recipe."""

    strategy: Literal["gradient", "random"] = "gradient"
    """`random` draws one genotype a seed uniformly instead of searching (baseline a)."""
    min_fps: Positive | None = None
    """With `random`: reject genotypes whose predicted FPS is not above this (baseline b)."""
    epochs: Count = 150
    batch_size: Count = 16
    accumulate: Count = 1
    augmentation: Augmentation = Augmentation()
    weight_lr: Positive = 0.025
    weight_lr_min: NonNegative = 0.001
    momentum: Fraction = 0.9
    weight_decay: NonNegative = 1e-3
    weight_clip: Positive = 5.0
    arch_lr: Positive = 1e-3
    arch_betas: tuple[Decay, Decay] = (0.5, 0.999)
    arch_weight_decay: NonNegative = 1e-4
    arch_clip: Positive = 10.0
    temperature_start: Positive = 1.0
    temperature_end: Positive = 0.03
    latency_loss: Literal["linear_ms", "log_total", "log_cell", "log_edge"] = "linear_ms"
    beta: NonNegative = 0.005
    latency_target_ms: Positive | None = None
    """Replaces beta: the argmax genotype's predicted latency, constant part included."""

    @model_validator(mode="after")
    def _fits(self) -> SearchConfig:
        if self.temperature_end > self.temperature_start:
            raise ValueError("temperature_end must not exceed temperature_start")
        if self.min_fps is not None and self.strategy != "random":
            raise ValueError('min_fps needs strategy = "random"')
        return self


class PretrainConfig(Section):
    """Image classification before finetuning; the defaults are the DARTS ImageNet recipe."""

    enabled: Switch = True
    data: Path | None = None
    """Folder with train/CLASS/*.jpg and val/CLASS/*.jpg; none: synthetic classes."""
    epochs: Count = 250
    batch_size: Count = 128
    image_size: Pixels = 224
    lr: Positive = 0.1
    schedule: Literal["exponential", "cosine"] = "exponential"
    lr_decay: Fraction = 0.97
    warmup_epochs: CountOrZero = 0
    momentum: Fraction = 0.9
    weight_decay: NonNegative = 3e-5
    label_smoothing: Fraction = 0.1
    clip: Positive = 5.0
    synthetic_images: Count = 2000


class FinetuneConfig(Section):
    """Section 6; the defaults are the paper's Cityscapes recipe."""

    epochs: Count = 200
    coarse_epochs: CountOrZero = 0
    """Cityscapes only: epochs on the coarse labels before the fine ones."""
    batch_size: Count = 8
    accumulate: Count = 1
    augmentation: Augmentation = Augmentation(crop=(769, 1537))
    lr: Positive = 0.01
    power: Positive = 0.9
    momentum: Fraction = 0.9
    weight_decay: NonNegative = 5e-4
    loss: Literal["ohem", "cross_entropy"] = "ohem"
    ohem_threshold: Fraction = 0.7
    ohem_keep: Fraction = 1 / 16
    """The hardest share of the batch's pixels that always counts."""
    class_weights: Literal["none", "inverse_log"] = "none"
    """inverse_log: 1 / ln(1.02 + share of the class), as ENet."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    sync_bn: Switch = False
    validate_every: Count = 10


def _own_size(size: object) -> object:
    return None if size == "image" else size


class EvaluateConfig(Section):
    size: Annotated[Size | None, BeforeValidator(_own_size)] = (769, 1537)
    """Network input; None (in TOML: "image") is the image's own size."""
    protocols: Annotated[tuple[Protocol, ...], Field(min_length=1)] = ("full", "bisenet_speed")
    batch_size: Count = 1


def _known_device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device, re.ASCII):
        raise ValueError("must be auto, cpu, cuda or cuda:N")
    return device


class RunConfig(Section):
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    """One run each; more than one adds a summary over the seeds."""
    genotype: str | None = None
    """Train this genotype (a shipped name or a JSON file) instead of searching for one."""
    device: Annotated[str, AfterValidator(_known_device)] = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs that have it, else fp32."""
    cuda_graph: Switch = True
    """On a GPU that trains alone: each training step is one CUDA graph, else eager."""
    backend: Literal["auto", "triton", "cuda", "reference"] = "auto"
    """Implementation of the operations; auto: what the device's tuning table names, else
    reference."""
    strict_backend: Switch = False
    """With auto: falling back to the reference on a GPU is an error, no warning."""
    data: DataConfig = DataConfig()
    space: dict[str, Any] = {"name": "lgcnet"}
    """`name` of the search space (or `package.module:Class`) and that space's options."""
    latency: LatencyConfig = LatencyConfig()
    search: SearchConfig = SearchConfig()
    pretrain: PretrainConfig = PretrainConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _strictly_auto(self) -> RunConfig:
        if self.strict_backend and self.backend != "auto":
            raise ValueError(
                f'strict_backend is for backend = "auto"; {self.backend!r} never falls back'
            )
        return self

    @model_validator(mode="after")
    def _one_folder_a_seed(self) -> RunConfig:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} must differ from each other")
        return self


def load_config(
    path: Path | None = None, preset: str = "paper", overrides: tuple[str, ...] = ()
) -> RunConfig:
    """Preset, then the file at `path`, then `section.key=value` overrides (values as in TOML).

    Relative paths in the file are meant from the file's folder, all others from the working
    folder; the result holds absolute paths, so that a run continues from anywhere. Raises
    `ConfigError`.
    """
    here = Path.cwd()
    source = f"preset {preset}"
    merged = _resolve_paths(_read_toml(_preset_text(preset), source), here)
    if path is not None:
        source = str(path)
        given = _read_toml(_file_text(path), source)
        merged = _lay_over(merged, _resolve_paths(given, path.parent))
    above: dict[str, Any] = {}
    for override in overrides:
        above = _merge(above, _resolve_paths(_parse_override(override), here))
    merged = _lay_over(merged, above)
    return validate_config(merged, f"{source} with overrides" if overrides else source)


def validate_config(values: dict[str, Any], source: str) -> RunConfig:
    """Raises `ConfigError` naming every key at fault, with the nearest valid key."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {explain(error, RunConfig)}") from None


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """One line for each fault of a pydantic validation: the key, what is wrong, the nearest key."""
    return "\n  ".join(_fault_line(fault, model, prefix) for fault in error.errors())


def _fault_line(fault: ErrorDetails, model: type[BaseModel], prefix: str) -> str:
    where = (prefix + ".".join(str(part) for part in fault["loc"])).rstrip(".")
    if fault["type"] == "extra_forbidden":
        near = _nearest(str(fault["loc"][-1]), _keys_beside(model, fault["loc"]))
        return f"unknown key {where!r}{near}"
    reason = fault["msg"].removeprefix("Value error, ")
    line = f"{where}: {reason}" if where else reason
    return line if isinstance(fault["input"], dict) else f"{line} (given {_short(fault['input'])})"


def _nearest(name: str, valid: list[str]) -> str:
    near = difflib.get_close_matches(name, valid, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; valid here: {', '.join(valid)}" if valid else ""


def _keys_beside(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        model = inner
    return list(model.model_fields)


def _preset_text(name: str) -> str:
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}{_nearest(name, list(PRESETS))}")
    preset = resources.files("lgcnet_fast").joinpath("presets").joinpath(f"{name}.toml")
    return preset.read_text(encoding="utf-8")


def _file_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error}") from None


def _read_toml(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    # Besides TOMLDecodeError: ValueError for numbers of thousands of digits, RecursionError for
    # thousands of brackets.
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid TOML: {error}") from None


def _parse_override(override: str) -> dict[str, Any]:
    key, separator, value = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not separator or not all(parts):
        raise ConfigError(f"override {override!r}: write it as section.key=value")
    nested: Any = _override_value(value.strip())
    for part in reversed(parts):
        nested = {part: nested}
    return nested


def _override_value(text: str) -> Any:
    """As in TOML; what is not TOML is a string, so that strings need no quotes."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _lay_over(base: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
    """Merges, but a plug-in space has options of its own, so those of the layers below go."""
    space = layer.get("space")
    if isinstance(space, dict) and ":" in str(space.get("name", "")):
        base = {key: value for key, value in base.items() if key != "space"}
    return _merge(base, layer)


def _merge(base: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in above.items():
        below = base.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            value = _merge(below, value)
        merged[key] = value
    return merged


def _resolve_paths(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Makes the paths of one layer absolute, relative ones being meant from `folder`."""
    resolved = dict(values)
    for section, key in (("data", "root"), ("data", "cache_dir"), ("pretrain", "data")):
        part = values.get(section)
        if isinstance(part, dict) and isinstance(part.get(key), str):
            resolved[section] = resolved[section] | {key: _absolute(part[key], folder)}
    latency = values.get("latency")
    if isinstance(latency, dict) and str(latency.get("table", "")).endswith(".json"):
        resolved["latency"] = latency | {"table": _absolute(latency["table"], folder)}
    if str(values.get("genotype", "")).endswith(".json"):
        resolved["genotype"] = _absolute(values["genotype"], folder)
    return resolved


def _absolute(path: str, folder: Path) -> str:
    try:
        expanded = Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"path {path!r}: {error}") from None
    return os.path.abspath(folder / expanded)
