"""The sizes of steps and rows that a run chooses by itself, and its flags and name."""

from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from minimind import ModelConfig
from minimind.training.arguments import StageArgs
from minimind.training.batches import batch_shape, fit_to_data, longest_row, micro_tokens
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
        ("minimind2", 1, 4, False, 65536, 2048),  # nothing fits: a row for each process, and the GPU will say so
    ],
)
def test_micro_tokens_fit_the_card(monkeypatch, preset, gib, ranks, recompute, step, expected):
    properties = SimpleNamespace(total_memory=gib << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    job = SimpleNamespace(
        parallel=SimpleNamespace(world_size=ranks),
        device=torch.device("cuda"),
        config=ModelConfig.preset(preset),
        args=SimpleNamespace(row=512, recompute=recompute, batch_warmup=0.0),
    )
    assert micro_tokens(job, step) == expected
    job.args.batch_warmup = 0.5  # the first steps are a quarter
    assert micro_tokens(job, step) == min(expected, max(step // 4, 512 * ranks))


def test_cuda_graphs_refuse_fsdp(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"--cuda-graph: FSDP's weights .* take --parallel ddp"):
        Job.begin("pretrain", StageArgs(compile=True, cuda_graph=True, parallel="fsdp"), Console(quiet=True))


@pytest.mark.parametrize(
    ("device", "gib", "ranks", "flags", "expected"),
    [
        ("cpu", 0, 1, {}, 4096),
        ("cpu", 0, 2, {}, 2048),  # a row for each process in 4096 tokens
        ("cpu", 0, 1, {"batch_tokens": 1024}, 1024),
        ("cpu", 0, 1, {"batch_tokens": 1500}, 512),  # the error about --batch-tokens follows
        ("cpu", 0, 1, {"micro_tokens": 2048}, 2048),
        ("cpu", 0, 32, {"plan_gpu": True}, 2048),  # a step has 65,536 tokens
        ("cuda", 24, 8, {}, 4096),
        ("cuda", 2, 1, {}, 512),  # a card that is too small for the model: it will say so
    ],
)
def test_the_longest_row_fits_the_step_the_processes_and_the_card(monkeypatch, device, gib, ranks, flags, expected):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=gib << 30))
    args = {"batch_tokens": None, "micro_tokens": None, "recompute": False, "plan_gpu": False} | flags
    job = SimpleNamespace(
        parallel=SimpleNamespace(world_size=ranks),
        device=torch.device(device),
        default_device="cuda" if args["plan_gpu"] else device,
        args=SimpleNamespace(**args),
        config=ModelConfig.preset("minimind2"),
        initial=SimpleNamespace(preset="minimind2"),
    )
    assert longest_row(job) == expected


class NanoJob(SimpleNamespace):
    """What fit_to_data reads of a job on a CPU; a step has 4096 tokens, 8 rows."""

    default_device = "cpu"
    initial = SimpleNamespace(preset="nano")

    def settle(self, name, rule):
        return self.chosen.setdefault(name, rule()[0])


@pytest.mark.parametrize(
    ("rows", "ranks", "flags", "chosen", "shape", "told"),
    [
        (8, 1, {}, {}, (8, 1), None),
        (100, 1, {}, {}, (8, 1), None),
        (5, 1, {}, {}, (5, 1), "a step takes 2,560, each row 1.0 times; --batch-tokens sets another"),
        (1, 1, {}, {}, (1, 1), "a step takes 512, each row 1.0 times; --batch-tokens sets another"),
        (7, 2, {}, {}, (6, 1), "a step takes 3,072, each row 0.9 times; --batch-tokens sets another"),
        (1, 2, {}, {}, (2, 1), "a step takes 1,024, each row 2.0 times; --batch-tokens sets another"),
        (5, 1, {"batch_tokens": 4096}, {}, (8, 1), "a step takes 4,096, each row 1.6 times; lower --batch-tokens"),
        (5, 1, {"micro_tokens": 1024}, {}, (2, 2), "a step takes 2,048, each row 0.8 times; --batch-tokens sets"),
        (1, 1, {"micro_tokens": 1024}, {}, (2, 1), "a step takes 1,024, each row 2.0 times; --batch-tokens sets"),
        (5, 1, {}, {"step": "usual"}, (8, 1), "a step takes 4,096, each row 1.6 times; --batch-tokens sets"),
        (5, 1, {}, {"step": 3 * 512}, (3, 1), "a step takes 1,536, each row 0.6 times; --batch-tokens sets"),
    ],
)
def test_a_step_is_no_larger_than_the_data(rows, ranks, flags, chosen, shape, told):
    args = SimpleNamespace(
        row=512,
        seq_len=512,
        recompute=False,
        scale=1.0,
        batch_warmup=0.0,
        **{"batch_tokens": None, "micro_tokens": None} | flags,
    )
    job = NanoJob(
        args=args, flags=args, parallel=SimpleNamespace(world_size=ranks), device=torch.device("cpu"),
        config=ModelConfig.preset("nano"), notes=[], chosen=dict(chosen),
    )  # fmt: skip
    loader = SimpleNamespace(tokens_per_epoch=rows * 460, fill=460 / 512, view=SimpleNamespace(num_documents=60))
    assert fit_to_data(job, loader, *batch_shape(job)) == shape
    if told is None:
        assert job.notes == [] and job.chosen.keys() == {"batch_tokens"}
        return
    (note,) = job.notes
    size = f"60 documents, {rows * 460:,} tokens in {rows:,} rows of 512"
    assert note.startswith(f"little data: {size}, less than a step of 4,096 tokens; {told}")
    assert job.chosen.get("step") == (
        None if "batch_tokens" in flags else chosen.get("step", shape[0] * shape[1] * 512)
    )
