"""Whether a device has memory for a copy of the weights beside all that training needs."""

from collections.abc import Iterable

import torch
from torch import Tensor

from gapaware.distributed import local


def check_room(parameters: Iterable[Tensor], least_itemsize: int = 1) -> None:
    """Refuse a copy where the device has no memory for it beside the most that training has ever taken.

    Args:
        parameters: what is to be copied.
        least_itemsize: bytes that each number of the copy takes at least, as where it is in float32.

    Raises:
        MemoryError: that is so, on a CUDA device; of others it is not known.
    """
    needed: dict[torch.device, int] = {}
    for parameter in map(local, parameters):
        if parameter.is_cuda:
            size = parameter.numel() * max(parameter.element_size(), least_itemsize)
            needed[parameter.device] = needed.get(parameter.device, 0) + size
    for device, size in needed.items():
        room = _room(device)
        if size > room:
            raise MemoryError(
                f"{size / 2**20:.0f} MiB on {device} for a copy of the weights, {room / 2**20:.0f} are free"
            )


def _room(device: torch.device) -> int:
    """Bytes that nobody has taken when training takes as much as it ever did."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.max_memory_reserved(device)
