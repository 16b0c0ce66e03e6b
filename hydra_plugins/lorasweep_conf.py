"""Hydra finds the conf files of outside packages by this plug-in: their folder `conf` stands beside ours."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from lorasweep.config.registry import outside_conf


class LorasweepConf(SearchPathPlugin):
    """Adds the folders in which tasks and readers of outside packages have their settings."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in outside_conf():
            search_path.append("lorasweep", f"file://{folder}")
