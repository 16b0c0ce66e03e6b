"""Hydra accepts plugin classes only from the package hydra_plugins; ours is lorasweep/runner/hydra_sweeper.py."""

from lorasweep.runner import hydra_sweeper


class LorasweepSweeper(hydra_sweeper.LorasweepSweeper):
    """The sweeper under the name that Hydra looks for."""
