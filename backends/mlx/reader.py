"""The bytes of one tensor out of a part, every number checked before anything is read.

They are read into memory of their own, not mapped: a file that becomes shorter under a mapping
kills the process (SIGBUS), and so does a disk that fails; here both are sentences. The copy lives
only until the tensor is repacked, one tensor at a time, and the kernel may drop its own at will,
which matters on a machine that shares its memory with its GPU.
"""

from __future__ import annotations

import os
import stat

import numpy as np
from numpy.typing import NDArray

from backends.base import BackendFault, Place, TensorFact
from backends.mlx import blocks

_READ_BYTES = 64 << 20  # at once; macOS refuses reads of 2 GiB


def read(place: Place, fact: TensorFact) -> NDArray[np.uint8]:
    """The tensor's bytes, [bytes], not to be written to.

    Raises BackendFault: refused where the header contradicts itself or the file, memory where there
    is not enough of it, failed where the disk does not give the bytes.
    """
    size = blocks.size_bytes(fact.type, fact.shape)
    if fact.size != size:
        raise BackendFault(
            f"the header gives a tensor of {fact.type} and shape {list(fact.shape)} {fact.size} "
            f"bytes instead of {size}; pull the model again",
            "refused",
        )
    try:
        # O_NONBLOCK: opening a pipe would wait for somebody to write into it.
        descriptor = os.open(place.file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            _check(descriptor, place, size)
            data = np.empty(size, np.uint8)  # no larger than the file is
            _fill(data, descriptor, place)
        finally:
            os.close(descriptor)
    except OSError as error:
        why = f"{place.file} cannot be read: {error.strerror}"
        raise BackendFault(why, "failed") from None
    except MemoryError:
        why = f"there is no memory for a tensor of {size} bytes in {place.file}"
        raise BackendFault(why, "memory") from None
    data.flags.writeable = False
    return data


def _check(descriptor: int, place: Place, size: int) -> None:
    """Refuse what is no file, or too short a file."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        why = f"{place.file} is no file; remove it, and it is fetched again"
        raise BackendFault(why, "refused")
    if place.offset < 0 or place.offset + size > found.st_size:
        raise BackendFault(
            f"{place.file} has {found.st_size} bytes, and a tensor in it should lie at bytes "
            f"{place.offset} to {place.offset + size}; remove the file, and it is fetched again",
            "refused",
        )


def _fill(data: NDArray[np.uint8], descriptor: int, place: Place) -> None:
    """Read as many bytes as the array has. Raises BackendFault where the file has them no more."""
    left = data.data
    with os.fdopen(descriptor, "rb", buffering=0, closefd=False) as file:
        file.seek(place.offset)
        while left:
            count = file.readinto(left[:_READ_BYTES])
            if not count:
                raise BackendFault(
                    f"{place.file} became shorter while it was read; remove it, and it is fetched "
                    "again",
                    "refused",
                )
            left = left[count:]
