"""From the weights that are trained to their average and back, around an evaluation."""

from contextlib import AbstractContextManager
from typing import Any

from gapaware.caution import caution
from gapaware.state import Resumable


class Evaluating(Resumable):
    """The part of `GapAware` that is called beside the steps."""

    _warned: set[str]

    def _guarded(self, doing: str) -> AbstractContextManager[None]:
        """Keep what goes wrong inside from training."""
        raise NotImplementedError("GapAware defines _guarded")

    def eval(self) -> None:
        """Put the average of the last weights into the model, where a raised factor makes them wander.

        As with Schedule-Free: call it before an evaluation or a checkpoint, and `train()` before the next
        step; the Hugging Face Trainer does. From the first call of either on there may be an average, a
        copy of the weights where there is one (none of a model in shards). Everywhere else, with
        `average=False`, and at a factor of 1, nothing moves. A wrapped optimizer with an `eval()` of its
        own decides itself.

        Example:
            >>> import torch
            >>> from gapaware import GapAware
            >>> model = torch.nn.Linear(2, 1)
            >>> optimizer = GapAware(torch.optim.AdamW(model.parameters(), lr=1e-3))
            >>> optimizer.eval()  # evaluate, save
            >>> optimizer.train()
        """
        self._switch("eval")

    def train(self) -> None:
        """Put the weights that are trained back after `eval()`, unless others were loaded in between."""
        self._switch("train")

    def _switch(self, to: str) -> None:
        if self._me is not self:
            self._me._switch(to)
            return
        theirs = [own for leaf in self.leaves() if callable(own := getattr(leaf, to, None))]
        if not theirs:
            with self._guarded("the average of the weights"):
                if to == "eval":
                    self._copies.eval(self.base.param_groups, self._steps)
                else:
                    self._copies.train(self.base.param_groups)
            return
        with self._guarded("weights that others wrote"):
            self._copies.notice(self.base.param_groups, self._steps)
        for switch in theirs:
            switch()
        with self._guarded("weights that others write"):
            self._copies.note(self.base.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        # what others have written before a copy is made, the copy cannot know
        copies = self._copies.noticed(self.base.param_groups, self._steps)
        return {**super().__getstate__(), "_copies": copies}

    def _train_after_all(self) -> None:
        if self._copies.average.exchanged and "train" not in self._warned:
            self._warned.add("train")
            caution(
                "step() after eval(): its gradient is that of the average of the weights; call train() on "
                "the optimizer before the next step, as on the model (said once)"
            )
        self.train()
