"""Hydra accepts plugin classes only from the package hydra_plugins; all they do stands in lorasweep/sweeper.py."""

from lorasweep.sweeper import LorasweepSweeper

__all__ = ["LorasweepSweeper"]
