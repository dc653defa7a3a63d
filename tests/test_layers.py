"""Import direction between the folders, and an import that costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lgcnet_fast

PACKAGE = Path(lgcnet_fast.__file__).parent
LAYERS = (
    {"cli"},
    {"train", "benchmark"},
    {"deploy"},
    {"report"},
    {"latency", "data"},
    {"space"},
    {"nn"},
    {"ops"},
    {"kernels", "native"},
    {"doctor"},
    {"stack"},
    {"config", "parallel"},
    {"errors", "files", "recording"},
)
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}


def parts_of_package() -> set[str]:
    return {
        entry.stem if entry.is_file() else entry.name
        for entry in PACKAGE.iterdir()
        if entry.suffix == ".py" or any(entry.glob("*.py"))
    } - {"__init__", "__main__"}


def imported_modules(path: Path) -> Iterator[str]:
    """Absolute names of all modules that a file imports, inside functions too."""
    folder = ["lgcnet_fast", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from lgcnet_fast import config` names a part of the package in the list.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def wrong_imports(path: Path) -> list[str]:
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    targets = {
        name.split(".")[1] for name in imported_modules(path) if name.startswith("lgcnet_fast.")
    }
    return [
        f"{path.relative_to(PACKAGE)} imports {target}"
        for target in sorted(targets & RANK.keys())
        if target != own and RANK[target] <= RANK[own]
    ]


def test_every_part_has_a_layer() -> None:
    data_folders = {"presets"}
    assert parts_of_package() - data_folders <= RANK.keys()


def test_imports_point_in_one_direction() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "__main__.py"]
    files = [path for path in files if path.parent != PACKAGE or path.stem in RANK]
    assert len(files) > 20
    assert [fault for path in files for fault in wrong_imports(path)] == []


def test_a_wrong_import_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    path = tmp_path / "ops" / "bad.py"
    path.parent.mkdir()
    for text in (
        "import lgcnet_fast.space.base",
        "from lgcnet_fast import space",
        "from lgcnet_fast.space import base",
        "def late():\n    from ..space import base",
    ):
        path.write_text(text)
        assert wrong_imports(path) == ["ops/bad.py imports space"], text


def modules_after(statements: str) -> set[str]:
    """Names of the modules that a fresh interpreter holds after running `statements`."""
    code = f"import sys\n{statements}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["", ".errors", ".config", ".doctor", ".cli"])
def test_light_imports_leave_torch_alone(module: str) -> None:
    assert not {"torch", "triton"} & modules_after(f"import lgcnet_fast{module}")


def test_no_module_starts_cuda_or_triton() -> None:
    names = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name not in ("__init__.py", "__main__.py")
    ]
    imports = "\n".join(f"import {name}" for name in names)
    check = "import torch\nassert not torch.cuda.is_initialized()"
    assert "triton" not in modules_after(f"{imports}\n{check}")
