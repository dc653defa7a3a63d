"""Compiles the CUDA extension where that can work; everything else is in pyproject.toml.

Switches are environment variables, explained in tools/native_build.py.
"""

import json
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))
import native_build  # noqa: E402

EXTENSION = "lgcnet_fast.native._kernels"


def write_record(folder: Path, plan: native_build.Plan, reason: str = "") -> None:
    """Beside the extension, for the loader, because installers hide what is printed here."""
    record = {
        "built": "no" if reason else "yes",
        "reason": reason,
        "architectures": plan.label,
        "nvcc": plan.toolkit.version if plan.toolkit else "",
    }
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=2) + "\n"
    folder.joinpath("build_record.json").write_text(text, encoding="utf-8")
    print(f"CUDA extension: {reason or plan.label}")


class BuildKernels(build_ext):
    """Runs nvcc; a failure ends the installation only where the extension was asked for."""

    failure = ""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            native_build.compile_extension(plan, Path(self.build_temp) / "native", target)
        except native_build.BuildError as error:
            self.failure = str(error)
            raise CompileError(self.failure) from None

    def run(self) -> None:
        super().run()
        write_record(Path(self.get_ext_fullpath(EXTENSION)).parent, plan, self.failure)


class BuildWithoutKernels(build_py):
    """Records why there is no extension."""

    def run(self) -> None:
        super().run()
        root = Path(__file__).resolve().parent if self.editable_mode else Path(self.build_lib)
        write_record(root / "lgcnet_fast" / "native", plan, plan.reason)


try:
    plan = native_build.make_plan()
except native_build.BuildError as error:
    sys.exit(f"CUDA extension: {error}")

if plan.toolkit:
    setup(
        ext_modules=[Extension(EXTENSION, sources=[], optional=not plan.required)],
        cmdclass={"build_ext": BuildKernels},
    )
else:
    setup(cmdclass={"build_py": BuildWithoutKernels})
