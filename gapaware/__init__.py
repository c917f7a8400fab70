"""Optimizers that mind the gap: wrap yours, watch the spectrum of its updates, adapt its learning rate."""

from gapaware.checkpoint import OwnState
from gapaware.composite import Composite, muon
from gapaware.consolidate import Consolidation, consolidate
from gapaware.controller import Controller, Decision, Observation
from gapaware.distillation import Distillation
from gapaware.distributed import Unsupported
from gapaware.line import starting_weights
from gapaware.log import package_version
from gapaware.optimizer import GapAware
from gapaware.scrambled import scrambled
from gapaware.spectrum import Spectrum

__version__ = package_version()

__all__ = [
    "Composite",
    "Consolidation",
    "Controller",
    "Decision",
    "Distillation",
    "GapAware",
    "Observation",
    "OwnState",
    "Spectrum",
    "Unsupported",
    "__version__",
    "consolidate",
    "muon",
    "scrambled",
    "starting_weights",
]
