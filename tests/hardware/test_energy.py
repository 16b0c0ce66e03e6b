"""Joules as a driver would count them, shared among the trials of a pass; nothing where there is no driver."""

import sys
import types
from itertools import count

import pytest
import torch
from support.parity import PLAIN, run, spec_of, trainer, workload_of

from lorasweep.hardware.energy import Energy
from lorasweep.packing import pass_cost
from lorasweep.training import engine


class NVMLError(Exception):
    pass


class Driver(types.SimpleNamespace):
    """Two cards; each look shows 500 mJ more."""

    NVMLError = NVMLError

    def __init__(self) -> None:
        super().__init__(asked=[], broken=False)
        self._shown = count(7000, 500)

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:
        self.asked.append(name)
        return name

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if self.broken:
            raise NVMLError
        return next(self._shown)


@pytest.fixture
def driver(monkeypatch) -> Driver:
    made = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", made)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda d: types.SimpleNamespace(uuid=f"card-{torch.device(d).index}")
    )
    return made


CARDS = [torch.device("cuda", 0), torch.device("cuda", 1)]


def test_joules_since_the_last_look_summed_over_the_cards(driver):
    one, both = Energy(CARDS[:1]), Energy(CARDS)
    assert driver.asked == ["GPU-card-0", "GPU-card-0", "GPU-card-1"]
    assert one.is_known and both.is_known
    assert one.used() == pytest.approx(0.5 * 3), "the looks of the other one passed in between"
    assert both.used() == pytest.approx(0.5 * 2 + 0.5 * 4)


def test_no_gpu_no_library_or_a_card_that_does_not_count_is_not_known(driver, monkeypatch):
    assert not Energy([torch.device("cpu")]).is_known and Energy([torch.device("cpu")]).used() == 0.0
    driver.broken = True
    assert not Energy(CARDS).is_known
    driver.broken = False
    lost = Energy(CARDS)
    driver.broken = True
    assert lost.used() == 0.0 and not lost.is_known, "half a count is none"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert not Energy(CARDS).is_known


def test_packed_trials_share_a_pass_by_their_rows(tiny_bert, monkeypatch, driver):
    monkeypatch.setattr(pass_cost, "overhead", lambda *a: float("inf"))
    sizes = ("train.batch_size=4", "train.batch_size=12")
    specs = [spec_of("seq_cls", tiny_bert, *PLAIN, size, "train.max_steps=2") for size in sizes]
    made, ended = trainer(specs[0], workload_of("seq_cls", tiny_bert)), {}
    made.passes.energy = Energy(CARDS[:1])

    def act(event):
        if isinstance(event, engine.TrialEnded):
            ended[event.number] = event.energy_j

    run(made, [engine.Job(i, s) for i, s in enumerate(specs)], 2, act)
    assert ended[0] == pytest.approx(2 * 0.5 * 4 / 16) and ended[1] == pytest.approx(2 * 0.5 * 12 / 16)


def test_trial_without_a_driver_has_no_joules(tiny_bert):
    made, ended = trainer(spec := spec_of("seq_cls", tiny_bert), workload_of("seq_cls", tiny_bert)), []
    jobs = [engine.Job(0, spec)]
    for event in made.run(lambda: jobs.pop() if jobs else None):
        if isinstance(event, engine.TrialEnded):
            ended.append(event.energy_j)
    assert ended == [None]
