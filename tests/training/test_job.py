"""What a stage takes at once, where nobody says."""

from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from minimind import ModelConfig
from minimind.training.arguments import StageArgs
from minimind.training.job import Job


@pytest.mark.parametrize(
    "preset, gib, ranks, recompute, step, expected",
    [
        ("minimind2-small", 24, 1, False, 65536, 65536),
        ("minimind2", 24, 1, False, 65536, 32768),
        ("minimind2", 24, 2, False, 65536, 65536),
        ("minimind2", 24, 1, True, 65536, 65536),
        ("minimind2-small", 4, 1, False, 65536, 16384),
        ("minimind2-small", 24, 1, False, 131072, 65536),
        (
            "minimind2",
            1,
            4,
            False,
            65536,
            2048,
        ),  # nothing fits: a row for each process, and the GPU will say so
    ],
)
def test_micro_tokens_fit_the_card(monkeypatch, preset, gib, ranks, recompute, step, expected):
    properties = SimpleNamespace(total_memory=gib << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    job = SimpleNamespace(
        parallel=SimpleNamespace(world_size=ranks), device=torch.device("cuda"),
        config=ModelConfig.preset(preset), args=SimpleNamespace(row=512, recompute=recompute),
    )  # fmt: skip
    assert Job._micro_tokens(job, step) == expected


def test_cuda_graphs_need_weights_that_stay_where_they_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"--cuda-graph: FSDP's weights .* take --parallel ddp"):
        Job.begin("pretrain", StageArgs(compile=True, cuda_graph=True, parallel="fsdp"), Console(quiet=True))
