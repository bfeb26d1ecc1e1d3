"""Which GPUs `pagemill worker --gpus` means, as CUDA_VISIBLE_DEVICES names them."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping

ALL = "all"
_ASK = ("nvidia-smi", "--query-gpu=index", "--format=csv,noheader")
_ASK_TIMEOUT = 30.0  # seconds; a driver that is not loaded yet takes some


class NoSuchGpu(ValueError):
    """A GPU is named that this machine does not have. The message says which ones there are."""


def choose_gpus(wanted: str, environment: Mapping[str, str]) -> list[str]:
    """The GPUs of `wanted`: `all`, or places such as `0,2` among those that this process may see.

    Raises `NoSuchGpu`.
    """
    visible = visible_gpus(environment)
    if not visible:
        raise NoSuchGpu("No GPU is visible here: nvidia-smi finds none, and CUDA_VISIBLE_DEVICES names none.")
    if wanted == ALL:
        return visible
    places = [place.strip() for place in wanted.split(",")]
    for place in places:
        if not place.isascii() or not place.isdigit() or int(place) >= len(visible):
            raise NoSuchGpu(f"--gpus is all, or places from 0 to {len(visible) - 1}, e.g. 0,1; {place!r} is none.")
    if len(set(map(int, places))) < len(places):
        raise NoSuchGpu("--gpus names a GPU twice.")
    return [visible[int(place)] for place in places]


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """What CUDA_VISIBLE_DEVICES names (numbers, UUIDs, parts by MIG); where it is not set, all that nvidia-smi finds.

    The numbers of nvidia-smi are those of CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    try:
        found = subprocess.run(_ASK, capture_output=True, text=True, timeout=_ASK_TIMEOUT, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return found.stdout.split()


def group_gpus(gpus: list[str], size: int) -> list[list[str]]:
    """The GPUs of each worker, `size` for one. Raises `NoSuchGpu` where some would be left over."""
    if len(gpus) % size:
        raise NoSuchGpu(f"{len(gpus)} GPUs cannot be divided between workers of {size} (--tensor-parallel-size) each.")
    return [gpus[start : start + size] for start in range(0, len(gpus), size)]
