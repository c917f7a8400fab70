"""Inputs that no task has shown, to ask a model for its old answers (pseudorehearsal).

Robins, "Catastrophic forgetting, rehearsal and pseudorehearsal", Connection Science 7, 1995, drew its
pseudo-inputs at random. Scrambles of the new task's inputs have its range and mean without a setting.
"""

import torch
from torch import Tensor


def scrambled(examples: Tensor) -> Tensor:
    """Shuffle the elements within each example, in another order for each.

    Args:
        examples: (n, ...), such as pixels or token ids; a dict of tensors has to be taken apart first.

    Returns:
        A tensor of the same shape, dtype and device; the order comes from torch's random state there.

    Raises:
        TypeError: it is no tensor.
        ValueError: a tensor of one dimension or none, which has nothing to shuffle within an example.

    Example:
        >>> images = torch.arange(12).view(2, 2, 3)
        >>> scrambled(images).flatten(1).sort().values.equal(images.flatten(1))
        True
    """
    if not isinstance(examples, Tensor):
        raise TypeError(
            f"examples: is a {type(examples).__name__}; pass a tensor, and of a dict of them the one to "
            "shuffle: inputs=lambda batch: {**batch, 'pixel_values': scrambled(batch['pixel_values'])}"
        )
    if examples.ndim < 2:
        raise ValueError(
            f"examples: has the shape {tuple(examples.shape)}; pass (n, ...), of two dimensions or more"
        )
    flat = examples.flatten(1)
    order = torch.rand(flat.shape, device=flat.device).argsort(1)
    return flat.gather(1, order).view(examples.shape)
