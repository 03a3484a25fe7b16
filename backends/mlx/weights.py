"""Repacked tensors in MLX's memory: put into mlx_lm's layers, or held as the two ends' matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import BackendFault, Header, Place, Weights
from backends.mlx import reader, repack
from backends.mlx.library import Library
from backends.mlx.repack import Dense, Packed


class Tensors:
    """Reads a window's tensors by their names in the whole model, and remembers which."""

    def __init__(
        self, library: Library, header: Header, places: Mapping[str, Place], weights: Weights
    ) -> None:
        self._library, self._header, self._places = library, header, places
        self._weights = weights
        self.size_bytes = 0  # of all that were taken, in MLX's memory
        self.widened_bytes = 0  # of the largest one in float32: see _widened

    def take(self, name: str) -> Dense | Packed:
        """One tensor, repacked. Raises BackendFault."""
        fact, place = self._header.tensors.get(name), self._places.get(name)
        if fact is None or place is None:
            raise BackendFault(f"the window came without the model's tensor {name}", "refused")
        data = reader.read(place, fact)
        return repack.repack(fact.type, fact.shape, data, self._weights)

    def fill(self, layer: Any, path: str, name: str, offset: float) -> None:
        """Put the tensor `name` where `path` points in a layer. offset: added to its values."""
        *above, last = path.split(".")
        owner = layer
        for step in above[:-1]:
            owner = owner[step]
        module = owner[above[-1]] if above else layer
        want = tuple(module[last].shape)
        found = self.take(name)
        if isinstance(found, Packed) and len(want) < 2:
            raise BackendFault(f"the tensor {name} is of a type that it never has", "refused")
        if isinstance(found, Packed):
            _check(name, _unpacked(found), want)
            quantised = _quantised(self._library, module, found)
            owner[above[-1]] = quantised
            arrays = [
                quantised[part] for part in ("weight", "scales", "biases") if part in quantised
            ]
        else:
            _check(name, found.values.shape, want)
            array = dense(self._library, found)
            if array.ndim < 2 and array.dtype != self._library.mx.float32:
                array = array.astype(self._library.mx.float32)
            module[last] = array + offset if offset else array
            arrays = [module[last]]
        self._library.mx.eval(arrays)
        self.size_bytes += sum(array.nbytes for array in arrays)
        self.widened_bytes = max(self.widened_bytes, _widened(arrays))

    def matrix(self, name: str, rows: int, columns: int) -> Matrix:
        """A matrix of its own: the token embedding, or the output."""
        found = self.take(name)
        shape = _unpacked(found) if isinstance(found, Packed) else found.values.shape
        _check(name, shape, (rows, columns))
        matrix = Matrix(self._library, found)
        self.size_bytes += matrix.size_bytes
        self.widened_bytes = max(self.widened_bytes, _widened(matrix.arrays))
        return matrix

    def vector(self, name: str) -> NDArray[np.float32]:
        """A short tensor, as numpy's. Raises BackendFault where it is quantised."""
        found = self.take(name)
        if isinstance(found, Packed) or found.bf16:
            raise BackendFault(f"the tensor {name} is of a type that it never has", "refused")
        return found.values.astype(np.float32)


class Matrix:
    """Rows looked up, or multiplied with. [rows, columns], as it is in memory."""

    def __init__(self, library: Library, found: Dense | Packed) -> None:
        self._mx = library.mx
        self._packed = found if isinstance(found, Packed) else None
        if isinstance(found, Packed):
            self._weight, self._scales, self._biases = _arrays(library, found)
            self._how = {"group_size": found.group, "bits": found.bits, "mode": found.mode}
        else:
            self._weight, self._scales, self._biases = dense(library, found), None, None
        held = (self._weight, self._scales, self._biases)
        self.arrays = [array for array in held if array is not None]
        self._mx.eval(self.arrays)
        self.size_bytes = sum(array.nbytes for array in self.arrays)

    def rows(self, ids: Any) -> Any:
        """float32 [ids, columns]. Scales are widened first: MLX dequantises in their type."""
        mx = self._mx
        if self._packed is None:
            return self._weight[ids].astype(mx.float32)
        if self._packed.mode != "affine":
            return mx.dequantize(
                self._weight[ids], self._scales[ids], None, dtype=mx.float32, **self._how
            )
        scales, biases = (part[ids].astype(mx.float32) for part in (self._scales, self._biases))
        return mx.dequantize(self._weight[ids], scales, biases, **self._how)

    def times(self, x: Any) -> Any:
        """float32 [tokens, rows] of x: float32 [tokens, columns]."""
        if self._packed is None:
            return x @ self._weight.T
        return self._mx.quantized_matmul(
            x, self._weight, self._scales, self._biases, transpose=True, **self._how
        )


def dense(library: Library, found: Dense) -> Any:
    """Its values as an array of the type that they are of."""
    array = library.mx.array(found.values)
    return array.view(library.mx.bfloat16) if found.bf16 else array


def _arrays(library: Library, found: Packed) -> tuple[Any, Any, Any]:
    mx = library.mx
    biases = None if found.biases is None else mx.array(found.biases)
    return mx.array(found.weight), mx.array(found.scales), biases


def _widened(arrays: list[Any]) -> int:
    """What MLX makes of 16-bit numbers, or scales, at each product with float32: a copy."""
    return sum(array.size * 4 for array in arrays if array.itemsize == 2)


def _unpacked(found: Packed) -> tuple[int, ...]:
    """The shape of the numbers that it stands for."""
    return (*found.scales.shape[:-1], found.scales.shape[-1] * found.group)


def _quantised(library: Library, module: Any, found: Packed) -> Any:
    """The quantised twin of a linear layer, or of a stack of them (experts).

    Made without its constructor, which would quantise random numbers first.
    """
    nn = library.nn
    stack = found.weight.ndim == 3
    kind = library.switch_linear() if stack else nn.QuantizedLinear
    twin = kind.__new__(kind)
    nn.Module.__init__(twin)
    twin.group_size, twin.bits, twin.mode = found.group, found.bits, found.mode
    twin.weight, twin.scales, biases = _arrays(library, found)
    twin.biases = biases
    if stack:
        twin.global_scale = None
    if "bias" in module:
        twin.bias = module["bias"]
    twin.freeze()
    return twin


def _check(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if tuple(found) != tuple(wanted):
        raise BackendFault(
            f"the model's tensor {name} is of shape {list(found)}, and its header asks for "
            f"{list(wanted)}: pull the model again",
            "refused",
        )
