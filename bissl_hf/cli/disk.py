"""Disks that are full or fail while a run writes to them."""

import errno
import os
import re

from safetensors import SafetensorError

_OF_DISKS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE})
# safetensors has the system's error in its text only; torch (2.13, 2026-11) says no more than that it could not write.
_NUMBER = re.compile(r"\(os error ([0-9]+)\)")
_TORCH = re.compile(r"PytorchStreamWriter failed|inline_container.*unexpected pos")


def reason_of_disk(error: BaseException) -> str | None:
    """Returns what the system says of a disk, with the file where that is known, or `None` for any other error.

    Args:
        error (`BaseException`): as it was raised; what it came from counts, too.
    """
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno in _OF_DISKS:
            place = f" ({found.filename})" if found.filename else ""
            return f"{os.strerror(found.errno)}{place}"
        number = _NUMBER.search(str(found)) if isinstance(found, SafetensorError) else None
        if number and int(number[1]) in _OF_DISKS:
            return os.strerror(int(number[1]))
        if isinstance(found, RuntimeError) and _TORCH.search(str(found)):
            return "a file could not be written"
        found = found.__cause__ or found.__context__
    return None
