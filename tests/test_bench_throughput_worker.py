"""The process of a contender of bench/throughput.py, without the process."""

import torch

from bench.training import implementations as contenders
from bench.training.worker import _turn


def test_contenders_on_one_gpu_leave_it_to_each_other(monkeypatch):
    """Together they hold more than a card may have: a turn gives back what it took, and begins with a step that does
    not count."""
    told: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: told.append("emptied"))

    def step() -> int:
        me.loading += 1.0
        told.append("step")
        return 1

    me = contenders.Contender(step)
    with _turn(me, torch.device("cuda")):
        assert told == ["step"] and me.loading == 0
        me.step()
    assert told == ["step", "step", "emptied"] and me.loading == 1
    with _turn(me, torch.device("cpu")):
        pass
    assert len(told) == 3
