"""Hydra accepts plugin classes only from the package hydra_plugins; all they do stands in lorasweep/sweeper.py."""

from lorasweep import sweeper


class LorasweepSweeper(sweeper.LorasweepSweeper):
    """The sweeper under the name that Hydra looks for."""
