"""Bring small tensors to the host and to the device without making one wait for the other."""

import torch
from torch import Tensor


class Transfer:
    """A tensor on its way to the host.

    On CUDA the copy into pinned memory is queued behind the work that computes the tensor, and only
    `result` waits for it: a snapshot later, when it has long arrived.

    Args:
        tensor: small; not to be changed afterwards if it is on the host already.

    Example:
        >>> Transfer(torch.ones(2)).result()
        tensor([1., 1.])
    """

    def __init__(self, tensor: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._host = torch.empty(
                tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True
            )
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tensor.device))
        else:
            self._host = tensor.to("cpu")

    def __getstate__(self) -> dict[str, Tensor | None]:
        # an event belongs to its process and cannot be copied
        return {"_host": self.result(), "_arrived": None}

    def result(self) -> Tensor:
        """The tensor on the host, once it is there."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        return self._host


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; from the host to CUDA through pinned memory, behind the work queued there.

    Args:
        tensor: small; not to be changed afterwards if it is on the device already.
        device: where to.

    Example:
        >>> send(torch.ones(2), torch.device("cpu"))
        tensor([1., 1.])
    """
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
