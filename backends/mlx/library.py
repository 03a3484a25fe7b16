"""The one door to MLX and to mlx_lm's model classes: nothing else in halka imports either.

`import mlx_lm` runs its __init__, which loads transformers (0.6 s, 82 MB) and lowers this process's
limit of open files for good. Its model classes need neither, so a bare package of the same name and
path stands in for it. On Linux mlx compiles C++ with whatever g++ it finds, into a folder that all
processes share: switched off there. Modules are looked up by name because they exist on a peer only
where the extra is installed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from backends.base import BackendFault, Device

# Releases whose internals were compared with llama.cpp: mlx_lm's change from one to the next.
_TESTED = {"mlx": ((0, 32, 2), (0, 33)), "mlx-lm": ((0, 32, 2), (0, 33))}
_MEND = "pip install 'halka[mlx]' in halka's environment"


@dataclass(frozen=True, slots=True)
class Library:
    """mx: mlx.core. nn: mlx.nn. utils: mlx.utils."""

    mx: Any
    nn: Any
    utils: Any

    def model(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """mlx_lm's Model `name` for these ModelArgs, lazy: its random weights are never made.

        Raises BackendFault where its class does not take them.
        """
        try:
            module = importlib.import_module(f"mlx_lm.models.{name}")
            return module.Model(module.ModelArgs.from_dict(dict(arguments)))
        except (ImportError, TypeError, ValueError, AttributeError) as error:
            raise BackendFault(f"mlx_lm's model class {name} cannot be used: {error}") from None

    def switch_linear(self) -> Any:
        """mlx_lm's class of quantised experts."""
        return importlib.import_module("mlx_lm.models.switch_layers").QuantizedSwitchLinear


@cache
def library() -> Library:
    """MLX, loaded at the first call. Raises ImportError, saying what to install."""
    for name, (least, below) in _TESTED.items():
        _check(name, least, below)
    if sys.platform != "darwin":
        os.environ.setdefault("MLX_DISABLE_COMPILE", "1")
    try:
        mx = importlib.import_module("mlx.core")
    except ImportError as error:
        raise ImportError(f"MLX cannot be loaded ({error}): {_MEND}") from None
    if "mlx_lm" not in sys.modules:
        _stand_in()
    return Library(mx, importlib.import_module("mlx.nn"), importlib.import_module("mlx.utils"))


def _check(name: str, least: tuple[int, ...], below: tuple[int, ...]) -> None:
    wanted = f"{_dotted(least)} or newer, below {_dotted(below)}"
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"{name} is not installed: {_MEND}") from None
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:3])
    if not least <= numbers < below:
        raise ImportError(f"{name} is of release {found}; halka works with {wanted}: {_MEND}")


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _stand_in() -> None:
    """Put a package named mlx_lm in place whose modules are found and whose __init__ is not run."""
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"mlx-lm is not installed: {_MEND}")
    package = types.ModuleType("mlx_lm")
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = spec
    sys.modules["mlx_lm"] = package


def devices() -> list[Device]:
    """What MLX computes on: the GPU of an Apple chip, which shares the machine's memory, or the
    processor. Raises ImportError."""
    mx = library().mx
    info = mx.device_info()
    pages, free = os.sysconf("SC_PHYS_PAGES"), _free_bytes()
    total = pages * os.sysconf("SC_PAGE_SIZE")
    name = str(info.get("device_name") or platform.machine())
    if not mx.metal.is_available():
        return [Device(name, "cpu", min(free, total), total)]
    # Beyond it, macOS takes memory from the GPU's allocations.
    limit = int(info.get("max_recommended_working_set_size") or total * 3 // 4)
    used = int(mx.get_active_memory()) + int(mx.get_cache_memory())
    gpu = Device(name, "metal", max(0, limit - used), limit, integrated=True)
    return [gpu, Device(platform.processor() or name, "cpu", min(free, total), total)]


def wire(mx: Any) -> None:
    """Let macOS keep the weights where the GPU reads them, as mlx_lm does while it generates:
    pages that are unused for a second would be slow to come back."""
    if mx.metal.is_available():
        mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))


def _free_bytes() -> int:
    """Free memory; macOS does not tell it by sysconf, and all of it is the answer there."""
    names = os.sysconf_names
    key = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in names else "SC_PHYS_PAGES"
    return os.sysconf(key) * os.sysconf("SC_PAGE_SIZE")
