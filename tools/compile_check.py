"""Compiles every CUDA kernel without a GPU and prints what each one takes.

    python tools/compile_check.py               sm_61 (Titan Xp), with NVRTC 12.9
    python tools/compile_check.py --nvcc 75 90  these, with the nvcc found here

NVRTC comes from pip (nvidia-cuda-nvrtc-cu12==12.9.*), in an environment of its own because torch
pins another; `make compile-check` does all that. Fails where a kernel does not compile, spills
registers, or takes more shared memory than a block has on every GPU. Standard library only.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from native_build import (
    SOURCES,
    BuildError,
    find_toolkit,
    kernel_instances,
    machine_code,
    write_shards,
)

TITAN_XP = 61
MAX_SHARED_BYTES = 48 * 1024


@dataclass(frozen=True)
class Resources:
    """What one kernel takes, as ptxas reports it."""

    kernel: str
    registers: int
    shared_bytes: int
    spilled_bytes: int

    @property
    def fault(self) -> str:
        if self.spilled_bytes:
            return f"spills {self.spilled_bytes} bytes of registers"
        if self.shared_bytes > MAX_SHARED_BYTES:
            return f"takes {self.shared_bytes} bytes of shared memory, more than {MAX_SHARED_BYTES}"
        return ""


class Nvrtc:
    """The few calls of the run-time compiler that are needed."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("nvidia")
        folders = map(Path, (spec and spec.submodule_search_locations) or ())
        found = [
            path for folder in folders for path in folder.glob("cuda_nvrtc/lib/libnvrtc.so.12")
        ]
        if not found:
            raise BuildError("NVRTC 12 is missing: pip install 'nvidia-cuda-nvrtc-cu12==12.9.*'")
        self._library = ctypes.CDLL(str(found[0]))
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"

    def compile(self, source: str, expressions: Sequence[str], architecture: int) -> str:
        """The log of compiling template instantiations of a file. Raises `BuildError`."""
        program = ctypes.c_void_p()
        text = f'#include "{source}"\n'.encode()
        self._library.nvrtcCreateProgram(ctypes.byref(program), text, b"check.cu", 0, None, None)
        for expression in expressions:
            self._library.nvrtcAddNameExpression(program, expression.encode())
        options = (
            f"--gpu-architecture=sm_{architecture}",
            f"-I{SOURCES}",
            "-std=c++17",
            "-ftz=true",  # as CuPy compiles
            "--ptxas-options=-v",
        )
        packed = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = self._library.nvrtcCompileProgram(program, len(options), packed)
        size = ctypes.c_size_t()
        self._library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        self._library.nvrtcGetProgramLog(program, log)
        self._library.nvrtcDestroyProgram(ctypes.byref(program))
        if status != 0:
            raise BuildError(f"{source} for sm_{architecture}:\n{log.value.decode()}")
        return log.value.decode()


def compile_with_nvrtc(architecture: int) -> list[Resources]:
    """Raises `BuildError`."""
    nvrtc = Nvrtc()
    print(f"sm_{architecture}, NVRTC {nvrtc.version}")
    instances = [one for one in kernel_instances() if not one.hopper]
    logs = [
        nvrtc.compile(
            source, [one.expression for one in instances if one.source == source], architecture
        )
        for source in sorted({one.source for one in instances})
    ]
    return read_log("\n".join(logs), instances)


def compile_with_nvcc(architecture: int) -> list[Resources]:
    """Raises `BuildError`."""
    toolkit, name = find_toolkit(), machine_code(architecture)
    print(f"sm_{name}, nvcc {toolkit.version}")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        commands = [
            [str(toolkit.nvcc), "-std=c++17", "-O3", f"-gencode=arch=compute_{name},code=sm_{name}"]
            + [
                "-cubin",
                "-Xptxas",
                "-v",
                f"-I{SOURCES}",
                str(shard),
                "-o",
                str(shard.with_suffix(".cubin")),
            ]
            for shard in write_shards(Path(folder))
        ]
        return read_log("\n".join(pool.map(_run, commands)), kernel_instances())


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise BuildError(done.stdout)
    return done.stdout


def read_log(log: str, instances: Sequence[Any]) -> list[Resources]:
    """The entries of `ptxas -v`. Raises `BuildError` unless every one of the kernels has one."""
    parts = re.split(r"Compiling entry function '(\w+)' for '\w+'", log)
    names = demangle(parts[1::2])
    found = {
        name: Resources(
            name,
            _number(r"Used (\d+) registers", report),
            _number(r"(\d+) bytes smem", report),
            _number(r"(\d+) bytes spill stores", report)
            + _number(r"(\d+) bytes spill loads", report),
        )
        for name, report in zip(names, parts[2::2], strict=True)
    }
    expected = [instance.expression for instance in instances]
    missing = [name for name in expected if name not in found]
    if missing:
        raise BuildError(f"the compiler reported nothing for {', '.join(missing)}")
    return [found[name] for name in expected]


def demangle(names: Sequence[str]) -> list[str]:
    """C++ names in the spelling of `Instance.expression`."""
    if shutil.which("c++filt") is None:
        raise BuildError("c++filt is missing (it belongs to binutils)")
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    return [
        line.removeprefix("void ").partition("(")[0].replace(", ", ",")
        for line in text.splitlines()
    ]


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0


def print_table(resources: Sequence[Resources]) -> None:
    width = max(len(one.kernel) for one in resources)
    print(f"{'kernel':{width}}  registers  shared bytes  spilled bytes")
    for one in resources:
        print(
            f"{one.kernel:{width}}  {one.registers:9}  {one.shared_bytes:12}"
            f"  {one.spilled_bytes:13}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every CUDA kernel without a GPU.")
    parser.add_argument(
        "--nvcc",
        nargs="+",
        type=int,
        metavar="ARCH",
        help="with nvcc for these, such as 75 90, instead of NVRTC for sm_61",
    )
    wanted = parser.parse_args().nvcc
    try:
        tables = (
            [(number, compile_with_nvcc(number)) for number in wanted]
            if wanted
            else [(TITAN_XP, compile_with_nvrtc(TITAN_XP))]
        )
    except BuildError as error:
        print(error, file=sys.stderr)
        return 2
    faults = 0
    for architecture, resources in tables:
        print_table(resources)
        for one in resources:
            if one.fault:
                faults += 1
                print(f"sm_{architecture}: {one.kernel} {one.fault}", file=sys.stderr)
    print(f"{sum(len(resources) for _, resources in tables)} kernels compiled, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
