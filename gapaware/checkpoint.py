"""GapAware's own state as an entry of its own in a distributed checkpoint.

`torch.distributed.checkpoint.state_dict` keeps `state` and `param_groups` of an optimizer, in terms of
parameter names, and drops everything else. What GapAware adds to a state is small, and every rank has it,
but for the starting weights that mode="retain" keeps: these are sharded as the parameters are.
"""

import io
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from gapaware.optimizer import GapAware


class OwnState:
    """The factors, window and history of a `GapAware`, for checkpoints that drop them.

    It is `Stateful` in the sense of `torch.distributed.checkpoint`, and an object for accelerate's
    `register_for_checkpointing`. It may be loaded before or after the wrapped optimizer's state, on any
    number of ranks:

        state = {"optimizer": get_optimizer_state_dict(model, optimizer), "gapaware": OwnState(optimizer)}
        dcp.save(state, checkpoint_id=folder)

        dcp.load(state, checkpoint_id=folder)
        set_optimizer_state_dict(model, optimizer, state["optimizer"])

    Without it the wrapped optimizer's state is restored and GapAware starts anew, with an empty window. Of
    what was logged since the last snapshot one rank's is saved: the first mean after a resume is of that.

    Args:
        optimizer: the one to save or to restore.

    Example:
        >>> from gapaware import GapAware
        >>> def new():
        ...     return GapAware(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1))
        >>> saved = OwnState(new()).state_dict()
        >>> OwnState(new()).load_state_dict(saved)
    """

    def __init__(self, optimizer: "GapAware") -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """One entry of bytes, whose length may differ between checkpoints where a tensor's may not.

        And the starting weights where there are any, on which a checkpoint is loaded in place. The average
        that a push follows and that of the weights are left out, since they come and go: they start anew.
        What is saved between `eval()` and `train()` resumes from the average.
        """
        own = self.optimizer.state_dict()["gapaware"]
        weights = self.optimizer.starting_weights()
        if own["anchor"]:
            own["anchor"]["weights"] = {}
        own["push"], own["average"] = {}, {}
        buffer = io.BytesIO()
        torch.save(own, buffer)
        return {"bytes": buffer.getvalue(), **({"anchor": weights} if weights else {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; nothing changes if that fails.

        Raises:
            ValueError: the state cannot be read.
        """
        try:
            buffer = io.BytesIO(state_dict["bytes"])
            own = torch.load(buffer, map_location="cpu", weights_only=True)
            if own["anchor"]:
                own["anchor"]["weights"] = state_dict.get("anchor", {})
        except Exception as error:
            raise ValueError(
                f"GapAware's own state cannot be read ({type(error).__name__}: {error}); nothing was "
                "changed. Leave the entry out to start with an empty window"
            ) from error
        self.optimizer.load_own_state(own)
