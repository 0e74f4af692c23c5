"""The path of a step: one call for the whole model up to the rows that it takes, the model's layers for more."""

import pytest

from minimind.inference.runner import Runner
from tests.inference.decode.cases import needs_native
from tests.inference.small import is_greedy, random_prompts, small_model
from tests.inference.test_engine import engine_of, greedily, new_ids


@needs_native
@pytest.mark.parametrize(
    "rows, whole, layers", [(8, {1, 2, 3, 4}, set()), (2, {1, 2}, {3, 4}), (0, set(), {1, 2, 3, 4})]
)
def test_few_rows_are_one_call_and_more_go_layer_by_layer(monkeypatch, rows, whole, layers):
    taken: dict[str, set[int]] = {"_decode_whole": set(), "_decode_layers": set()}
    for name, seen in taken.items():
        original = getattr(Runner, name)

        def record(self, *args, original=original, seen=seen):
            seen.add(args[-1])
            return original(self, *args)

        monkeypatch.setattr(Runner, name, record)
    model = small_model("qk_norm, untied")
    prompts = random_prompts(4, 30, model.config.vocab_size)
    requests = [greedily([p], new)[0] for p, new in zip(prompts, (4, 6, 8, 10), strict=True)]
    engine = engine_of(model, backend="native", max_batch=4)
    engine._runner._step_rows = rows
    for prompt, ids in zip(prompts, new_ids(engine.generate(requests)), strict=True):
        assert is_greedy(model, prompt, ids)
    assert (taken["_decode_whole"], taken["_decode_layers"]) == (whole, layers)
