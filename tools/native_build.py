"""Compiles csrc into a Python extension: finds nvcc, chooses architectures, writes for ninja.

Used by setup.py and by the compile check; imports nothing but the standard library (pybind11 and
ninja when it comes to compiling). The package itself cannot be imported while it is built.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc"
NATIVE = ROOT / "lgcnet_fast" / "native"

ARCHITECTURES = (60, 61, 70, 75, 80, 86, 89, 90, 100, 120)
"""What a wheel for everyone holds, as far as the toolkit offers it."""

SWITCH = "LGCNET_FAST_BUILD_CUDA"
"""1: compile or fail; 0: do not compile; unset or auto: compile where that can work."""

WANTED = "LGCNET_FAST_CUDA_ARCHS"
"""all, or numbers such as "61;90"; unset: the GPUs present, or else the oldest, with PTX."""

SHARDS = 4
"""Files among which the kernels are divided, to be compiled side by side."""


class BuildError(Exception):
    """The extension cannot be compiled; the message says why and what would help."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit."""

    nvcc: Path
    version: str
    offered: tuple[int, ...]
    """Architectures that it compiles for, such as 75 for sm_75."""


@dataclass(frozen=True)
class Plan:
    """What to compile, or why nothing is compiled."""

    toolkit: Toolkit | None
    architectures: tuple[int, ...] = ()
    """Machine code for each of these, PTX for the last."""
    reason: str = ""
    required: bool = False

    @property
    def label(self) -> str:
        """Such as "75;90+PTX"."""
        return ";".join(map(str, self.architectures)) + "+PTX" if self.architectures else ""


def make_plan(environ: Mapping[str, str] = os.environ) -> Plan:
    """Decides by the environment and the machine.

    Raises `BuildError` for a value that makes no sense, and where compiling was asked for with
    LGCNET_FAST_BUILD_CUDA=1 and cannot work.
    """
    switch = environ.get(SWITCH) or "auto"
    if switch not in ("auto", "0", "1"):
        raise BuildError(f"{SWITCH}={switch}: must be 0, 1 or auto")
    if switch == "0":
        return Plan(None, reason=f"{SWITCH}=0")
    try:
        toolkit = find_toolkit(environ)
        architectures = choose_architectures(environ.get(WANTED, ""), toolkit.offered, gpus())
    except BuildError as error:
        if switch == "1" or environ.get(WANTED):
            raise
        return Plan(None, reason=str(error))
    return Plan(toolkit, architectures, required=switch == "1")


def find_toolkit(environ: Mapping[str, str] = os.environ) -> Toolkit:
    """The toolkit of CUDA_HOME, or else of the nvcc on the path. Raises `BuildError`."""
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    path = str(Path(home) / "bin") if home else environ.get("PATH", "") + ":/usr/local/cuda/bin"
    found = shutil.which("nvcc", path=path)
    if found is None:
        raise BuildError(f"no nvcc in {home}/bin" if home else "no nvcc on the path")
    nvcc = Path(found)
    version = re.search(r"release ([\d.]+)", _output([found, "--version"]))
    offered = re.findall(r"compute_(\d+)\b", _output([found, "--list-gpu-arch"]))
    if not (version and offered):
        raise BuildError(f"{nvcc} does not answer like nvcc")
    return Toolkit(nvcc, version[1], tuple(sorted(map(int, offered))))


def gpus() -> tuple[int, ...]:
    """Compute capabilities of the GPUs in this machine, such as 90; none without a driver."""
    query = shutil.which("nvidia-smi")
    if query is None:
        return ()
    try:
        answer = _output([query, "--query-gpu=compute_cap", "--format=csv,noheader"])
    except BuildError:
        return ()
    found = re.findall(r"^\s*(\d+)\.(\d)\s*$", answer, re.MULTILINE)
    return tuple(sorted({int(major) * 10 + int(minor) for major, minor in found}))


def choose_architectures(
    wanted: str, offered: tuple[int, ...], present: tuple[int, ...]
) -> tuple[int, ...]:
    """Architectures to compile for. Raises `BuildError` for one that the toolkit does not offer."""
    if wanted == "all":
        return tuple(number for number in ARCHITECTURES if number in offered)
    if wanted:
        return _listed(wanted, offered)
    if present:
        return tuple(sorted({_nearest(number, offered) for number in present}))
    return (min(number for number in ARCHITECTURES if number in offered),)


def _listed(wanted: str, offered: tuple[int, ...]) -> tuple[int, ...]:
    numbers = wanted.split(";")
    if not all(number.isdecimal() for number in numbers):
        raise BuildError(f'{WANTED}={wanted}: must be all or numbers such as "61;90"')
    missing = [number for number in numbers if int(number) not in offered]
    if missing:
        raise BuildError(
            f"{WANTED}={wanted}: this nvcc does not compile for {', '.join(missing)}, only for "
            f"{', '.join(map(str, offered))}"
        )
    return tuple(sorted(set(map(int, numbers))))


def _nearest(capability: int, offered: tuple[int, ...]) -> int:
    """The newest architecture whose code, machine code or PTX, runs on that capability."""
    older = [number for number in offered if number <= capability]
    if not older:
        raise BuildError(
            f"the GPU here is sm_{capability}, this nvcc starts at sm_{offered[0]}: an older CUDA "
            "toolkit is needed (12 for GPUs before sm_75)"
        )
    return max(older)


# -- compiling ----------------------------------------------------------------------------------


def write_shards(folder: Path, shards: int = SHARDS) -> list[Path]:
    """CUDA files that together register every kernel instantiation."""
    folder.mkdir(parents=True, exist_ok=True)
    everything = kernel_instances()
    paths = []
    for shard in range(shards):
        share = everything[shard::shards]
        includes = sorted({instance.source for instance in share} | {"registry.h"})
        lines = [f'#include "{name}"' for name in includes]
        for number, instance in enumerate(share):
            name = instance.expression
            lines.append(f'static const lgcnet::Registration r{number}("{name}", &{name});')
        path = folder / f"kernels_{shard}.cu"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        paths.append(path)
    return paths


def kernel_instances() -> tuple[Any, ...]:
    """All of lgcnet_fast/native/instances.py, which is run on its own."""
    return tuple(runpy.run_path(str(NATIVE / "instances.py"))["all_instances"]())


def source_digest() -> str:
    return runpy.run_path(str(NATIVE / "sources.py"))["digest"]()


def compile_extension(plan: Plan, folder: Path, extension: Path) -> None:
    """Compiles into `extension`, with intermediate files in `folder`. Raises `BuildError`."""
    assert plan.toolkit is not None
    ninja = _find_ninja()
    folder = folder.resolve()
    sources = [SOURCES / "launch.cu", *write_shards(folder), SOURCES / "bindings.cpp"]
    (folder / "build_info.h").write_text(
        f'#define LGCNET_ARCHITECTURES "{plan.label}"\n'
        f'#define LGCNET_SOURCES "{source_digest()}"\n',
        encoding="utf-8",
    )
    rules = folder / "build.ninja"
    rules.write_text(_ninja_file(plan, sources, extension.resolve()), encoding="utf-8")
    extension.parent.mkdir(parents=True, exist_ok=True)
    _output([ninja, "-C", str(folder)])


def _ninja_file(plan: Plan, sources: list[Path], extension: Path) -> str:
    assert plan.toolkit is not None
    codes = [
        f"-gencode=arch=compute_{name},code=sm_{name}"
        for name in map(machine_code, plan.architectures)
    ]
    newest = plan.architectures[-1]
    codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    includes = [SOURCES, Path(_pybind11_include()), Path(sysconfig.get_path("include"))]
    common = (
        f"{_in_command(plan.toolkit.nvcc)} -std=c++17 -Xcompiler -fPIC"
        " -Xcompiler -fvisibility=hidden -I. " + " ".join(f"-I{_in_command(i)}" for i in includes)
    )
    lines = [
        "rule cuda",
        f"  command = {common} -O3 {' '.join(codes)} -c $in -o $out",
        "rule host",
        f"  command = {common} -O2 -c $in -o $out",
        "rule link",
        f"  command = {_in_command(plan.toolkit.nvcc)} -shared -cudart static"
        " -Xlinker --exclude-libs,ALL -Xlinker -s $in -o $out",
    ]
    headers = " ".join(_as_target(path) for path in sorted(SOURCES.glob("*.*h")))
    objects = []
    for source in sources:
        rule = "host" if source.suffix == ".cpp" else "cuda"
        objects.append(f"{source.stem}.o")
        lines.append(f"build {objects[-1]}: {rule} {_as_target(source)} | build_info.h {headers}")
    lines.append(f"build {_as_target(extension)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def machine_code(architecture: int) -> str:
    """Its name for nvcc. All GPUs of sm_90 have what sm_90a names, Hopper's own instructions."""
    return "90a" if architecture == 90 else str(architecture)


def _in_command(path: Path) -> str:
    """A path as ninja and its shell read it in a command."""
    return shlex.quote(str(path)).replace("$", "$$")


def _as_target(path: Path) -> str:
    """A path as ninja reads it among inputs and outputs."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def _pybind11_include() -> str:
    try:
        import pybind11
    except ModuleNotFoundError:
        raise BuildError("pybind11 is not installed (pip install pybind11 ninja)") from None
    return pybind11.get_include()


def _find_ninja() -> str:
    beside = Path(sys.executable).with_name("ninja")
    found = str(beside) if beside.exists() else shutil.which("ninja")
    if found is None:
        raise BuildError("ninja is not installed (pip install pybind11 ninja)")
    return found


def _output(command: list[str]) -> str:
    """What a command prints. Raises `BuildError` with it where the command fails."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error}") from None
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}")
    return done.stdout
