"""Loads the pack's engine by its path, as the pack itself does, under the name `videolora`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def load(module: str) -> ModuleType:
    """`load("core.shapes")` is the pack's module of that name."""
    if "videolora" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "videolora", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        package = sys.modules["videolora"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
    return importlib.import_module(f"videolora.{module}")
