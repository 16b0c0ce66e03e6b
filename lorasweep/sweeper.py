from dataclasses import dataclass
from hydra.core.config_store import ConfigStore
from hydra.plugins.sweeper import Sweeper
class LorasweepSweeper(Sweeper):
    def setup(self, **k): ...
    def sweep(self, arguments): ...
@dataclass
class C:
    _target_: str = "hydra_plugins.lorasweep_sweeper.LorasweepSweeper"
ConfigStore.instance().store(group="hydra/sweeper", name="lorasweep", node=C, provider="lorasweep")
