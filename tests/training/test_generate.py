import gc
import importlib
import weakref

import pytest
import torch

from minimind import ModelConfig
from minimind.inference.engine import Engine
from minimind.inference.generate import generate
from minimind.modeling import Model

module = importlib.import_module("minimind.inference.generate")


def small_model():
    torch.manual_seed(0)
    return Model(ModelConfig(32, 1, 2, 1, 16, 48, 50)).eval()


def test_greedy_continuation_equals_one_prompt_at_a_time():
    model = small_model()
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    together = generate(model, prompts, 12, temperature=0)
    assert together == [generate(model, [p], 12, temperature=0)[0] for p in prompts]
    ids = prompts[0] + together[0]
    assert model(torch.tensor([ids])).logits[0, 2:-1].argmax(dim=-1).tolist() == together[0]


def test_sampling_is_seeded_and_leaves_the_global_generator_alone():
    model = small_model()
    before = torch.get_rng_state()
    one = generate(model, [[1, 2]], 20, seed=3)
    assert one == generate(model, [[1, 2]], 20, seed=3) != generate(model, [[1, 2]], 20, seed=4)
    assert torch.equal(before, torch.get_rng_state())


def test_stops_before_the_stop_token():
    model = small_model()
    free = generate(model, [[1, 2]], 20, temperature=0)[0]
    stop = free[5]
    cut = generate(model, [[1, 2]], 20, temperature=0, stop_ids=(stop,))[0]
    assert cut == free[: free.index(stop)]


def test_bad_requests():
    with pytest.raises(ValueError, match="at least one token"):
        generate(small_model(), [[]], 3)
    with pytest.raises(ValueError, match="temperature=-1"):
        generate(small_model(), [[1]], 3, temperature=-1)


@pytest.fixture
def engines(monkeypatch):
    """Engines are kept as on a GPU with room; weak references to all that are made."""
    made = []

    class Watched(Engine):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(weakref.ref(self))

    monkeypatch.setattr(module, "Engine", Watched)
    monkeypatch.setattr(module, "_worth_keeping", lambda model, engine: True)
    monkeypatch.setattr(module, "_kept", weakref.WeakKeyDictionary())
    return made


def test_an_engine_serves_until_a_larger_one_is_needed(engines, monkeypatch):
    model, prompts = small_model(), [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    for _ in range(3):
        for asked, new in ((prompts, 12), (prompts[:2], 5), (prompts + prompts[:1], 9)):
            given = generate(model, asked, new, seed=2)
            with monkeypatch.context() as patch:
                patch.setattr(module, "_kept", weakref.WeakKeyDictionary())
                patch.setattr(module, "Engine", Engine)
                assert given == generate(model, asked, new, seed=2)
    assert len(engines) == 1
    generate(model, prompts * 2, 12)
    assert len(engines) == 2 and engines[0]() is None
    generate(model, prompts, 300)
    assert len(engines) == 3 and engines[1]() is None


def test_a_kept_engine_follows_the_weights(engines):
    model, other = small_model(), small_model()
    for parameter in other.parameters():
        parameter.data = parameter.data.flip(0)
    old, new = generate(model, [[1, 2]], 12), generate(other, [[1, 2]], 12)
    assert old != new and len(engines) == 2  # a model never gets another's engine
    with torch.no_grad():  # an optimizer's step
        for mine, its in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(its)
    assert generate(model, [[1, 2]], 12) == new
    for mine in model.parameters():  # weights that move, as when a checkpoint is loaded
        mine.data = mine.data.flip(0).clone()
    assert generate(model, [[1, 2]], 12) == old and len(engines) == 2
    model.to(torch.bfloat16)
    generate(model, [[1, 2]], 12)
    assert len(engines) == 3


def test_graphs_are_captured_again_only_where_weights_moved(engines, monkeypatch):
    captured = []
    monkeypatch.setattr("minimind.inference.engine.host_is_late", lambda device: True)
    real = importlib.import_module("minimind.inference.runner").DecodeGraphs
    monkeypatch.setattr("minimind.inference.runner.DecodeGraphs", lambda *args: captured.append(args) or real(*args))
    model = small_model()
    for _ in range(3):
        generate(model, [[1, 2], [3]], 12)
        with torch.no_grad():
            model.norm.weight.mul_(1.5)
    assert len(captured) == 1
    model.norm.weight.data = model.norm.weight.data.clone()
    generate(model, [[1, 2], [3]], 12)
    assert len(captured) == 2 and len(engines) == 1


def test_a_kept_engine_dies_with_its_model(engines):
    gc.disable()  # no cycle: memory must not wait for the collector
    try:
        model = small_model()
        generate(model, [[1, 2]], 5)
        assert engines[0]() is not None
        weights = weakref.ref(model.norm.weight)
        del model
        assert engines[0]() is None and weights() is None
        assert not module._kept
    finally:
        gc.enable()


def test_an_engine_that_failed_is_not_kept(engines, monkeypatch):
    model = small_model()
    generate(model, [[1, 2]], 5)
    with monkeypatch.context() as patch:
        patch.setattr(engines[0]()._runner, "prefill", lambda chunks: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate(model, [[1, 2]], 5)
    gc.collect()
    assert engines[0]() is None
    generate(model, [[1, 2]], 5)
    assert len(engines) == 2


def test_kept_figures(monkeypatch):
    """No engine is kept on a CPU, on a full GPU, or before a step has shown how much memory training takes."""
    model = small_model()
    engine = Engine(model, None, kv_tokens=64, max_batch=1)
    assert not module._worth_keeping(model, engine)
    generate(model, [[1, 2]], 5)
    assert model not in module._kept
    monkeypatch.setattr(Model, "device", torch.device("cuda"))
    for name, value in (("mem_get_info", (600, 9999)), ("memory_reserved", 400)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(Engine, "held_bytes", 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 700)
    assert not module._worth_keeping(model, engine)
    assert not module._worth_keeping(model, engine)
    with torch.no_grad():
        model.norm.weight.mul_(1.5)
    assert module._worth_keeping(model, engine)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 701)
    assert not module._worth_keeping(model, engine)
