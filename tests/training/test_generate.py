import pytest
import torch

from minimind import ModelConfig
from minimind.inference.generate import generate
from minimind.modeling import Model


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
