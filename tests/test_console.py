"""What a person sees of a worker: a line a trial, and one for all of them."""

import io

from rich.console import Console

from lorasweep import console
from lorasweep.hardware.matmul_peak import Throughput


def shown(monkeypatch, terminal: bool) -> tuple[console.Display, io.StringIO]:
    out = io.StringIO()
    monkeypatch.setattr(console, "Console", lambda: Console(file=out, force_terminal=terminal, width=120))
    return console.Display(), out


def test_terminal_shows_a_bar_a_trial_and_the_speed_of_all(monkeypatch):
    made, out = shown(monkeypatch, terminal=True)
    for number in (3, 4):
        made.begin(number, f"r={number}")
        made.step(number, 2, 10, 0.5, "12,346 tokens/s")
    made._live.refresh()
    last = out.getvalue().rsplit("trial 3 r=3", 1)[1]
    assert "trial 4 r=4" in last and "2/10" in last and "all trials: 12,346 tokens/s" in last
    made.close()


def test_lines_tell_the_speed_now_and_then(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    made, out = shown(monkeypatch, terminal=False)
    made.begin(0, "r=8")
    for clock[0] in (101.0, 129.0, 131.0, 132.0, 162.0):
        made.step(0, 7, 10, 0.5, f"{clock[0]:.0f} tokens/s")
    assert out.getvalue().splitlines()[1:] == [
        "trial=0 r=8 step=7/10 loss=0.5000; all trials: 131 tokens/s",
        "trial=0 r=8 step=7/10 loss=0.5000; all trials: 162 tokens/s",
    ]


def test_line_before_any_step_was_timed_leaves_the_speed_out(monkeypatch):
    """The first step of a trial is not timed, and may itself take half a minute."""
    monkeypatch.setattr(console, "LINE_EVERY_S", -1.0)
    made, out = shown(monkeypatch, terminal=False)
    made.begin(0, "r=8")
    made.step(0, 1, 10, 0.5, Throughput())
    assert out.getvalue().splitlines()[1:] == ["trial=0 r=8 step=1/10 loss=0.5000"]
