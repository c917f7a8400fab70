"""Warnings that point at the line of the person who can do something about them."""

import sys
import warnings

# between that line and where something is noticed: us, and who calls a step for somebody else
_PASSED_THROUGH = ("gapaware", "torch", "contextlib", "accelerate", "transformers")


def caution(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the innermost line that is neither ours nor that of those who call us.

    Example:
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     caution("the window is short")
        >>> str(caught[0].message)
        'the window is short'
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _module(frame.f_globals) in _PASSED_THROUGH:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _module(names: dict[str, object]) -> str:
    return str(names.get("__name__", "")).partition(".")[0]
