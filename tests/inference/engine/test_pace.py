"""The host is at most one step ahead of a GPU."""

from types import SimpleNamespace

import torch

from cat_fast.inference.engine.pace import HostPace


def test_the_step_before_the_last_one_is_waited_for(monkeypatch):
    done = []

    class Event:
        made = 0

        def __init__(self):
            self.number, Event.made = Event.made, Event.made + 1

        def record(self, stream):
            done.append(("launched", self.number))

        def synchronize(self):
            done.append(("waited", self.number))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace())
    pace = HostPace(torch.device("cuda"))
    for _ in range(3):
        pace.step()
    assert done == [("launched", 0), ("launched", 1), ("waited", 0), ("launched", 2), ("waited", 1)]


def test_nothing_happens_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", None)
    HostPace(torch.device("cpu")).step()
