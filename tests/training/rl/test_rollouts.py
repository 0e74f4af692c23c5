"""Sampling from the live weights, packing, and the state between rollouts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from minimind.config import ModelConfig
from minimind.data.prompts import Prompt, PromptSet
from minimind.objectives.policy import policy_loss
from minimind.objectives.surrogates import clip
from minimind.rewards import Rewards, RewardScale, RewardTerm, parse_rewards
from minimind.training.parallel import Parallel
from minimind.training.rl.actor_critic import ActorCritic, critic_of, load_both, save_both
from minimind.training.rl.collector import Collector, chunks, log_probs_of, per_answer
from minimind.training.rl.loader import DriftStop, Rollout, RolloutLoader, Shape, default_micro_batches, pack
from minimind.training.rl.rollouts import Answer, DrawnPrompt, PromptStream, RolloutOptions, Sampler
from minimind.value_head import ValueModel
from tests.inference.decode.cases import needs_native
from tests.inference.small import random_prompts, small_model, small_tokenizer

SHAPE = Shape(minibatches=2, epochs=2, micro_batches=2, max_new_tokens=9)


def prompt_set(count: int = 12, seed: int = 1) -> PromptSet:
    ids = random_prompts(count, 20, small_tokenizer().vocab_size, seed)
    return PromptSet([Prompt([{"role": "user", "content": str(i)}], row) for i, row in enumerate(ids)], 7)


def sampled(model, options: RolloutOptions, drawn=None, batch: int = 64) -> list[Answer]:
    prompts = prompt_set()
    sampler = Sampler(model, small_tokenizer(), 20, options.max_new_tokens, batch)
    return sampler.sample(prompts, drawn or [DrawnPrompt(i, i) for i in range(12)], options)


def truth(model, answers: list[Answer], dtype: torch.dtype) -> np.ndarray:
    """Log-probabilities of all sampled tokens from whole logits of one answer at a time, computed in `dtype`."""
    model = small_model().to(dtype)
    found = []
    for a in answers:
        ids = torch.from_numpy(np.concatenate((a.prompt_ids, a.ids)))
        with torch.no_grad():
            log_p = model(ids[None, :-1]).logits[0].log_softmax(-1)[len(a.prompt_ids) - 1 :]
        found.append(log_p.gather(1, ids[len(a.prompt_ids) :, None])[:, 0].double().numpy())
    return np.concatenate(found)


def test_engine_and_trainer_agree_to_rounding():
    """Both are within twice plain float32's error of the float64 truth, so the ratio is 1 before an update."""
    model = small_model()
    answers = sampled(model, RolloutOptions(3, 9))
    exact = truth(model, answers, torch.float64)
    plain = np.abs(truth(model, answers, torch.float32) - exact).max()
    eps = np.finfo(np.float32).eps * np.abs(exact).max()
    engine = np.concatenate([a.log_probs for a in answers])
    trainer = np.concatenate(log_probs_of(model, answers, SHAPE))
    assert np.abs(engine - exact).max() <= 2 * plain + eps
    assert np.abs(trainer - exact).max() <= 2 * plain + eps


def test_a_sample_is_a_function_of_weights_seed_and_number():
    model, options = small_model(), RolloutOptions(3, 9, seed=5)
    answers = sampled(model, options)
    few = sampled(model, options, [DrawnPrompt(7, 7), DrawnPrompt(2, 2)], batch=3)
    again = {(a.number, a.sample): a.ids.tolist() for a in answers}
    for a in few:
        assert a.ids.tolist() == again[a.number, a.sample]
    assert len({tuple(a.ids) for a in answers if a.number == 7}) > 1
    assert [a.ids.tolist() for a in sampled(model, replace(options, seed=6))] != [a.ids.tolist() for a in answers]
    twice = sampled(model, options, [DrawnPrompt(1, 4), DrawnPrompt(2, 4)])
    assert [a.ids.tolist() for a in twice[:3]] != [a.ids.tolist() for a in twice[3:]]  # the number, not the prompt
    ended = [a for a in answers if a.ended]
    assert all(a.ids[-1] == small_tokenizer().eos_token_id for a in ended)
    assert all(len(a.ids) == 9 for a in answers if not a.ended)


@needs_native
def test_8_bit_answers_carry_the_probabilities_of_the_rounded_weights():
    model, options = small_model(), RolloutOptions(3, 9)
    drawn = [DrawnPrompt(i, i) for i in range(12)]
    answers = Sampler(model, small_tokenizer(), 20, 9, 64, 3, torch.int8).sample(prompt_set(), drawn, options)
    trainer = np.concatenate(log_probs_of(model, answers, SHAPE))
    drift = np.abs(np.concatenate([a.log_probs for a in answers]) - trainer)
    assert 64 * np.finfo(np.float32).eps * np.abs(trainer).max() < drift.mean() < 0.05
    with pytest.raises(ValueError, match="must be None or torch"):
        Sampler(model, small_tokenizer(), 20, 9, 64, 3, torch.float16)


def test_sampler_follows_the_weights():
    model = small_model()
    sampler = Sampler(model, small_tokenizer(), 20, 9, 64)
    drawn, options = [DrawnPrompt(0, 0)], RolloutOptions(4, 9)
    before = sampler.sample(prompt_set(), drawn, options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std().nan_to_num(0))
    after = sampler.sample(prompt_set(), drawn, options)
    assert [a.ids.tolist() for a in after] != [a.ids.tolist() for a in before]
    engine = np.concatenate([a.log_probs for a in after])
    trainer = np.concatenate(log_probs_of(model, after, SHAPE))
    np.testing.assert_allclose(engine, trainer, atol=64 * np.finfo(np.float32).eps * np.abs(trainer).max())


def test_packed_numbers_stand_at_their_tokens():
    answers = sampled(small_model(), RolloutOptions(2, 9))
    rng = np.random.default_rng(0)
    for a in answers:
        for name in ("advantages", "reference", "values", "returns", "room"):
            setattr(a, name, rng.normal(size=len(a.ids)).astype(np.float32))
    batch = pack(answers, torch.device("cpu"), 100, 24, SHAPE)
    bounds, row = batch.cu_seqlens.tolist(), batch.input_ids[0]
    assert bounds[-1] == row.numel() and row.numel() % 128 == 0
    for a, start, end in zip(answers, bounds, bounds[1:], strict=False):
        both = np.concatenate((a.prompt_ids, a.ids))
        assert row[start:end].tolist() == both[:-1].tolist()
        at = slice(start + len(a.prompt_ids) - 1, start + len(both) - 1)
        assert batch.targets[0, at].tolist() == a.ids.tolist()
        for name, values in (
            ("old_log_probs", a.log_probs),
            ("advantages", a.advantages),
            ("reference_log_probs", a.reference),
            ("old_values", a.values),
            ("returns", a.returns),
            ("value_room", a.room),
        ):
            assert getattr(batch, name)[0, at].tolist() == values.tolist()
    assert batch.num_targets == sum(len(a.ids) for a in answers) == int((batch.targets != -100).sum())
    again = per_answer(batch.advantages, batch.targets, answers)
    assert all((a.advantages == b).all() for a, b in zip(answers, again, strict=True))
    assert [a for part in chunks(answers) for a in part] == answers


def test_an_empty_share_of_a_batch_costs_nothing():
    model = small_model().train()
    loss, aux, _ = policy_loss(model, pack([], torch.device("cpu"), 10, 2, SHAPE), clip)
    (loss + aux).backward()
    assert loss.item() == 0


def test_every_pass_has_each_prompt_once_from_any_position():
    stream = PromptStream(10, 3)
    drawn = stream.draw(0, 35)
    assert [d.number for d in drawn] == list(range(35))
    for epoch in range(3):
        assert sorted(d.prompt for d in drawn[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert drawn[13:24] == stream.draw(13, 11)
    assert [d.prompt for d in drawn[:10]] != [d.prompt for d in drawn[10:20]]


class Scripted:
    """A sampler whose answers have the rewards that `of` gives: a token for each."""

    def __init__(self, of) -> None:
        self.of = of

    def sample(self, prompts, drawn, options):
        return [
            Answer(d.prompt, d.number, i, np.array([1]), np.array([5]), np.zeros(1, np.float32), True, text)
            for d in drawn
            for i, text in enumerate(self.of(d.number))
        ]


def collector(of, **more) -> Collector:
    rewards = parse_rewards(["number"])
    data = PromptSet([Prompt([{"role": "user", "content": "?"}], [1], "1")] * 50, 0)
    return Collector(
        small_model(), Scripted(of), data, PromptStream(50, 0), rewards, 4, RolloutOptions(2, 1), SHAPE, Parallel(),
        lambda answers: {}, console=Console(quiet=True), **more,
    )  # fmt: skip


def test_groups_that_agree_are_replaced_until_the_bound():
    def every_third_differs(number: int) -> tuple[str, str]:
        return ("1", "2") if number % 3 == 0 else ("1", "1")

    rollout = collector(every_third_differs, refills=3)(0, 0, [])
    assert [a.number for a in rollout.answers[::2]] == [0, 3, 6, 9] and rollout.next == 10
    assert rollout.figures["degenerate_groups"] == pytest.approx(0.6) and rollout.figures["drawn"] == 2.5
    short = collector(every_third_differs, refills=1)(0, 0, [])
    assert [a.number for a in short.answers[::2]] == [0, 3, 6] and short.next == 8
    kept = collector(every_third_differs)(0, 5, [])
    assert [a.number for a in kept.answers[::2]] == [5, 6, 7, 8] and kept.next == 9
    none = collector(lambda number: ("1", "1"), refills=2)(0, 0, [])
    assert len(none.answers) == 2 * 12 and none.figures["degenerate_groups"] == 1


def test_answers_without_a_reward_are_left_out():
    def one_fails(samples):
        return [float("nan") if sample.text == "x" else 1.0 for sample in samples]

    made = collector(lambda number: ("x", "1") if number == 2 else ("1", "2"))
    made.rewards = Rewards([RewardTerm("number", 1.0, one_fails)])
    rollout = made(0, 0, [])
    assert [(a.number, a.sample) for a in rollout.answers if a.number == 2] == [(2, 1)]
    assert len(rollout.answers) == 7 and rollout.figures["reward_failed_number"] == 1
    assert rollout.figures["reward_dropped"] == 1


def test_answers_scored_again_have_the_trainers_log_probabilities():
    made = collector(lambda number: ("1", "2"), rescore=True)
    rollout = made(0, 0, [])
    exact = np.concatenate(log_probs_of(made.model, rollout.answers, SHAPE))
    assert (np.concatenate([a.log_probs for a in rollout.answers]) == exact).all() and (exact != 0).all()
    kept = collector(lambda number: ("1", "2"))(0, 0, [])
    assert not any(a.log_probs.any() for a in kept.answers)


def loader(shape: Shape = SHAPE, rank: int = 0, world: int = 1) -> RolloutLoader:
    def collect(number, first, previous):
        answers = sampled(
            model, RolloutOptions(2, 5, seed=number), [DrawnPrompt(first + i, (first + i) % 12) for i in range(3)]
        )
        for a in answers:
            a.advantages = np.full(len(a.ids), a.number, np.float32)
        assert len(previous) == (6 if number else 0)
        return Rollout(answers, first + 3)

    model = small_model()
    return RolloutLoader(collect, shape, Parallel(rank=rank, world_size=world), torch.device("cpu"))


def taken(source: RolloutLoader, count: int) -> list[tuple]:
    batches = [source.next_batch() for _ in range(count)]
    return [(b.input_ids.tolist(), b.advantages.tolist(), b.global_num_targets) for b in batches]


@pytest.mark.parametrize("after", [0, 1, 7, 8, 9])
def test_state_is_a_position_in_the_stream_of_batches(after, tmp_path):
    """Two rollouts of 2 epochs x 2 steps x 2 parts = 8 batches each."""
    straight = loader()
    taken(straight, after)
    state = straight.state()
    torch.save(state, tmp_path / "state.pt")
    expected = taken(straight, 16 - after)
    resumed = loader()
    resumed.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert taken(resumed, 16 - after) == expected


def test_reporting_a_non_finite_loss_samples_nothing():
    source = loader()
    taken(source, 8)
    before = source.state()  # the next batch needs a new rollout
    expected = taken(source, 1)
    source.collect = None
    source.load_state(before)
    assert taken(source, 1) == expected


def test_every_answer_is_in_each_pass_once_and_ranks_share_the_batches():
    whole = loader()
    batches = [whole.next_batch() for _ in range(8)]
    assert sum(b.num_targets for b in batches[:4]) == sum(b.num_targets for b in batches[4:])
    assert [b.global_num_samples for b in batches] == [2, 1, 2, 1] * 2
    ranks = [loader(rank=rank, world=2) for rank in range(2)]
    for batch in batches:
        own = [rank.next_batch() for rank in ranks]
        assert sum(b.num_targets for b in own) == batch.num_targets
        assert {b.global_num_targets for b in own} == {batch.num_targets}


def test_masked_answers_are_in_no_batch():
    source = loader()
    source.next_batch()
    answers = source.rollout.answers
    for a in answers[::2]:
        a.masked = True
    source._parts, source._taken = source._cut(0), 0
    batches = [source.next_batch() for _ in range(8)]
    learnt = sum(len(a.ids) for a in answers[1::2])
    assert sum(b.num_targets for b in batches[:4]) == sum(b.num_targets for b in batches[4:]) == learnt
    for a in answers:
        a.masked = True
    source._parts, source._taken = source._cut(0), 0
    assert source.next_batch().num_targets == 0


def cut_off(number: int) -> tuple[str, str]:
    return "1", "x"


def test_cut_off_answers_are_penalised_and_masked_on_request():
    """The second answer to each prompt was cut off: its reward is reduced by the penalty. The mask leaves it out of the
    loss, but other answers are still compared with it."""

    class CutOff(Scripted):
        def sample(self, prompts, drawn, options):
            answers = super().sample(prompts, drawn, options)
            for a in answers:
                a.ended = a.sample == 0
            return answers

    plain = collector(cut_off)
    plain.sampler = CutOff(cut_off)
    assert [a.reward for a in plain(0, 0, []).answers[:2]] == [1.0, 0.0]
    seen: list[list[float]] = []
    made = collector(cut_off, penalty=0.5, mask=True)
    made.sampler, made.advantages = (CutOff(cut_off), lambda answers: seen.append([a.score for a in answers]) or {})
    rollout = made(0, 0, [])
    assert [a.reward for a in rollout.answers[:2]] == [1.0, -0.5]
    assert [a.masked for a in rollout.answers] == [False, True] * 4 and rollout.figures["masked"] == 0.5
    assert seen == [[1.0, -0.5] * 4]


def test_a_rollout_of_cut_off_answers_is_reported():
    console = Console(record=True, width=200, quiet=False)
    made = collector(cut_off, mask=True)
    made.console = console

    class CutOff(Scripted):
        def sample(self, prompts, drawn, options):
            answers = super().sample(prompts, drawn, options)
            for a in answers:
                a.ended = False
            return answers

    made.sampler = CutOff(cut_off)
    with console.capture() as printed:
        assert made(0, 0, []).figures["masked"] == 1
    assert "all 8 answers of a rollout were cut off at --max-new-tokens 1" in " ".join(printed.get().split())


def test_scores_are_clipped_and_normalised_but_logged_rewards_are_not():
    made = collector(lambda number: ("1", "2"), scale=RewardScale((0.0, 0.5), running=True))
    rollout = made(0, 0, [])
    assert [a.score for a in rollout.answers[:2]] == pytest.approx([1.0, -1.0], rel=1e-6)
    assert rollout.figures["reward"] == 0.5 and rollout.figures["reward_clipped"] == 0.5
    assert rollout.figures["reward_mean"] == 0.25 and rollout.figures["reward_deviation"] == 0.25


@pytest.mark.parametrize("shared", [False, True])
def test_policy_and_critic_load_from_a_checkpoint(shared, tmp_path):
    def make(seed: int):
        model = small_model(seed=seed)
        both = ValueModel.from_model(model, keep_head=True) if shared else ActorCritic.from_policy(model)
        torch.nn.init.normal_(critic_of(both).value_head.weight)
        return both

    first, second = make(0), make(1)
    ids = torch.arange(9)[None]
    save_both(first, tmp_path)
    load_both(second, tmp_path, Parallel())
    assert torch.equal(first(ids, return_logits=True).logits, second(ids, return_logits=True).logits)
    assert torch.equal(critic_of(first)(ids).values, critic_of(second)(ids).values)


def test_the_rest_of_a_rollout_is_skipped_after_too_much_drift():
    """Two micro-batches of 10 and 30 tokens: the mean KL of all 40 tokens is compared with the target."""
    policy, critic = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    stop = DriftStop(0.1, [policy], Parallel())
    light, heavy = (replace(pack([], torch.device("cpu"), n, 1, SHAPE)) for n in (10, 30))

    def update(first: float, second: float) -> bool:
        policy.grad, critic.grad = torch.ones(2), torch.ones(2)
        stop.add(light, {"behaviour_kl": torch.tensor(10 * first)})
        stop.add(heavy, {"behaviour_kl": torch.tensor(30 * second)})
        stop.before_update()
        assert critic.grad is not None
        return policy.grad is not None

    assert update(0.3, 0.03)  # 0.0975
    state = stop.state_dict()
    assert not update(0.1, 0.11) and not update(0.0, 0.0)  # for the rest of the rollout
    assert stop.begin() == {"policy_steps": 1} and update(0.0, 0.0)
    stop.load_state_dict(state)
    assert (stop.stopped, stop.taken) == (False, 1)


def test_micro_batches_grow_with_the_model():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    nano, small, large = (ModelConfig.preset(name) for name in ("nano", "minimind2-small", "minimind2"))
    assert default_micro_batches(16, 256, small, cpu) == 1 and default_micro_batches(17, 256, small, cpu) == 2
    assert default_micro_batches(64, 256, small, gpu) == 1 and default_micro_batches(65, 256, small, gpu) == 2
    assert default_micro_batches(16, 256, large, cpu) == 4  # 1,365 tokens each, for three times the width times depth
    assert default_micro_batches(32, 256, nano, cpu) == 1
    assert default_micro_batches(1, 10**6, large, cpu) > 1
