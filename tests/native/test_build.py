"""Deciding what to compile, and the compile check's reading of the compiler's report."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


native_build = load_tool("native_build")
compile_check = load_tool("compile_check")
BuildError = native_build.BuildError
CUDA_12 = (50, 52, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90, 100, 120)
CUDA_13 = (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)


@pytest.fixture
def cuda_12(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for CUDA_HOME whose nvcc answers like that of CUDA 12."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    offered = "\n".join(f"compute_{number}" for number in CUDA_12)
    nvcc.write_text(
        "#!/bin/sh\ncase $1 in\n"
        '--version) echo "Cuda compilation tools, release 12.8, V12.8.93";;\n'
        f'--list-gpu-arch) echo "{offered}";;\n'
        "*) exit 1;; esac\n"
    )
    nvcc.chmod(0o755)
    monkeypatch.setattr(native_build, "gpus", tuple)
    return tmp_path


def test_all_architectures_are_those_that_the_toolkit_has() -> None:
    choose = native_build.choose_architectures
    assert choose("all", CUDA_12, ()) == (60, 61, 70, 75, 80, 86, 89, 90, 100, 120)
    assert choose("all", CUDA_13, (90,)) == (75, 80, 86, 89, 90, 100, 120)


def test_the_gpus_present_decide() -> None:
    choose = native_build.choose_architectures
    assert choose("", CUDA_13, (90, 80)) == (80, 90)
    assert choose("", CUDA_12, (61,)) == (61,)
    assert choose("", CUDA_13, (122,)) == (121,)
    with pytest.raises(BuildError, match="GPU here is sm_61, this nvcc starts at sm_75"):
        choose("", CUDA_13, (61,))


def test_without_a_gpu_the_oldest_serves_all() -> None:
    assert native_build.choose_architectures("", CUDA_13, ()) == (75,)
    assert native_build.choose_architectures("", CUDA_12, ()) == (60,)


def test_listed_architectures_are_checked() -> None:
    choose = native_build.choose_architectures
    assert choose("90;61", CUDA_12, ()) == (61, 90)
    with pytest.raises(BuildError, match="does not compile for 61, only for 75, 80"):
        choose("61;90", CUDA_13, ())
    with pytest.raises(BuildError, match="must be all or numbers"):
        choose("sm_90", CUDA_13, ())


def test_a_plan_for_the_toolkit_found(cuda_12: Path) -> None:
    plan = native_build.make_plan({"CUDA_HOME": str(cuda_12)})
    assert plan.label == "60+PTX" and not plan.required
    assert plan.toolkit.version == "12.8"


def test_switches(cuda_12: Path, tmp_path: Path) -> None:
    found, missing = {"CUDA_HOME": str(cuda_12)}, {"CUDA_HOME": str(tmp_path / "none")}
    off = native_build.make_plan({**found, native_build.SWITCH: "0"})
    assert off.toolkit is None and off.reason == "LGCNET_FAST_BUILD_CUDA=0"
    assert native_build.make_plan({**found, native_build.SWITCH: "1"}).required
    skipped = native_build.make_plan(missing)
    assert skipped.toolkit is None and "no nvcc in" in skipped.reason
    with pytest.raises(BuildError, match="no nvcc in"):
        native_build.make_plan({**missing, native_build.SWITCH: "1"})
    with pytest.raises(BuildError, match="=yes: must be 0, 1 or auto"):
        native_build.make_plan({**found, native_build.SWITCH: "yes"})


def test_an_nvcc_that_fails_is_a_reason(tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho no licence\nexit 3\n")
    nvcc.chmod(0o755)
    assert "no licence" in native_build.make_plan({"CUDA_HOME": str(tmp_path)}).reason


def test_the_shards_register_every_kernel_once(tmp_path: Path) -> None:
    text = "".join(path.read_text() for path in native_build.write_shards(tmp_path))
    instances = native_build.kernel_instances()
    assert text.count("Registration r") == len(instances)
    assert all(f'"{instance.expression}"' in text for instance in instances)


def report(mangled: str, registers: int, shared: int, spilled: int) -> str:
    return (
        f"ptxas info    : Compiling entry function '{mangled}' for 'sm_61'\n"
        f"    8 bytes stack frame, {spilled} bytes spill stores, {spilled} bytes spill loads\n"
        f"ptxas info    : Used {registers} registers, {shared} bytes smem, 400 bytes cmem[0]\n"
    )


SUM = "_ZN6lgcnet12sum_partialsILi16EEEvNS_20SumPartialsArgumentsE"
UPSAMPLE = "_ZN6lgcnet16upsample_forwardINS_4HalfELi8EEEvNS_17UpsampleArgumentsE"


def test_the_report_is_read_and_judged() -> None:
    names = ("lgcnet::sum_partials<16>", "lgcnet::upsample_forward<lgcnet::Half,8>")
    expected = [one for one in native_build.kernel_instances() if one.expression in names]
    log = report(UPSAMPLE, 40, 49153, 0) + report(SUM, 23, 2048, 4)
    by_name = {one.kernel: one for one in compile_check.read_log(log, expected)}
    assert by_name[names[0]].registers == 23
    assert by_name[names[0]].fault == "spills 8 bytes of registers"
    assert "49153 bytes of shared memory" in by_name[names[1]].fault
    with pytest.raises(BuildError, match="nothing for lgcnet::upsample_forward"):
        compile_check.read_log(report(SUM, 23, 2048, 0), expected)


def run(*command: str, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


INSPECT = """
import json
from lgcnet_fast.native import build_record, prebuilt, sources
try:
    extension = prebuilt._import_extension()
    kernels = len(extension.names()) if extension.sources == sources.digest() else -1
except ValueError as error:
    kernels = str(error)
print(json.dumps({"kernels": kernels, "record": build_record.read(), "file": sources.__file__}))
"""


def copy_of_the_sources(folder: Path) -> Path:
    ignore = shutil.ignore_patterns(
        ".*", "build", "dist", "*.egg-info", "*.so", "build_record.json", "__pycache__", "runs"
    )
    return Path(shutil.copytree(ROOT, folder / "copy", symlinks=True, ignore=ignore))


def test_an_installation_fails_where_the_extension_was_asked_for(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=ROOT,
        env={**os.environ, native_build.SWITCH: "1", "CUDA_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and f"no nvcc in {tmp_path}" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("with_cuda", [True, False])
def test_sdist_and_wheel_work(tmp_path: Path, with_cuda: bool) -> None:
    if with_cuda and not shutil.which("nvcc"):
        pytest.skip("needs nvcc")
    switch = {native_build.SWITCH: "1" if with_cuda else "0", native_build.WANTED: "75;80"}
    dist, site = tmp_path / "dist", tmp_path / "site"
    dist.mkdir()
    build = f"import setuptools.build_meta as build; build.build_sdist({str(dist)!r})"
    run(sys.executable, "-c", build, folder=copy_of_the_sources(tmp_path), **switch)
    (sdist,) = dist.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip")
    options = ("--quiet", "--no-build-isolation", "--no-deps")
    run(*pip, "wheel", *options, "-w", str(dist), str(sdist), folder=dist, **switch)
    (wheel,) = dist.glob("*.whl")
    assert ("none-any" in wheel.name) is not with_cuda
    run(*pip, "install", "--quiet", "--no-deps", "--target", str(site), str(wheel), folder=dist)
    answer = run(sys.executable, "-c", INSPECT, folder=dist, PYTHONPATH=str(site))
    found = json.loads(answer.splitlines()[-1])
    assert Path(found["file"]).is_relative_to(site)
    if with_cuda:
        assert found["kernels"] == len(native_build.kernel_instances())
        assert found["record"]["built"] == "yes"
        assert found["record"]["architectures"] == "75;80+PTX"
    else:
        assert found["kernels"] == "no extension was compiled: LGCNET_FAST_BUILD_CUDA=0"
    assert_holds_every_file(site)
    assert_commands_work(site, dist)


def assert_holds_every_file(site: Path) -> None:
    """Everything in the package's folders that is not built or cached."""
    package = ROOT / "lgcnet_fast"
    wanted: set[Path] = set()
    for folder in (package, package / "csrc", package / "kernels"):
        wanted |= {path.relative_to(package) for path in folder.rglob("*") if path.is_file()}
    built = {".so", ".pyc"}
    missing = [
        str(path)
        for path in sorted(wanted)
        if path.suffix not in built
        and path.name != "build_record.json"
        and not (site / "lgcnet_fast" / path).exists()
    ]
    assert not missing


def assert_commands_work(site: Path, folder: Path) -> None:
    """Those of the installed package, away from the sources."""
    for command, expected in (("--help", "search"), ("doctor", "torch"), ("lut list", "titanxp")):
        program = str(site / "bin" / "lgcnet")
        environment = {"PYTHONPATH": str(site), "COLUMNS": "120"}
        assert expected in run(program, *command.split(), folder=folder, **environment)
