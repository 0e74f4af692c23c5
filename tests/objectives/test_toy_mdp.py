"""PPO's parts together - packed episodes, GAE, whitening, clip, critic - on a problem whose optimum is known.

A corridor of six cells: the left end pays 0.3 and the right end 1, both end the episode, and every step discounts by
0.95. From cell 1 the near reward is one step away and the far one four: right is better in every cell (0.95^3 = 0.86
against 0.3). An episode of eight steps is cut off, not ended.
"""

from functools import partial

import torch

from minimind.objectives.advantages import gae, whiten
from minimind.objectives.policy import value_losses
from minimind.objectives.surrogates import PolicyObjective, PolicyTokens, SampledTokens, clip

CELLS, START, STEPS, GAMMA, LAM = 6, 1, 8, 0.95, 0.9
RIGHT_END, LEFT_END = 1.0, 0.3
EPISODES, EPOCHS = 64, 4
OPTIMUM = GAMMA ** (CELLS - 1 - START - 1) * RIGHT_END


def roll_out(logits: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Episodes packed one after the other: cells, actions, rewards, samples [M]; final [EPISODES], the cell that an
    episode was cut off in, or -1."""
    rows, final = [], []
    probabilities = logits.softmax(-1)
    for episode in range(EPISODES):
        cell = START
        for _ in range(STEPS):
            action = int(torch.multinomial(probabilities[cell], 1, generator=generator))
            following = cell + 2 * action - 1
            reward = RIGHT_END if following == CELLS - 1 else LEFT_END if following == 0 else 0.0
            rows.append((cell, action, reward, episode))
            cell = following
            if reward:
                break
        final.append(-1 if reward else cell)
    cells, actions, rewards, samples = (torch.tensor(column) for column in zip(*rows, strict=True))
    return dict(cells=cells, actions=actions, rewards=rewards.double(), samples=samples, final=torch.tensor(final))


def train(objective: PolicyObjective, sign: float = 1.0, updates: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, values) of a tabular policy and critic that begin indifferent."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(CELLS, 2, dtype=torch.float64, requires_grad=True)
    values = torch.zeros(CELLS, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits, values], lr=0.05)
    for _ in range(updates):
        seen = roll_out(logits.detach(), generator)
        cells, actions, samples = seen["cells"], seen["actions"], seen["samples"]
        old = values.detach()[cells]
        bootstrap = torch.where(seen["final"] < 0, 0.0, values.detach()[seen["final"].clamp(min=0)])
        advantages, returns = gae(seen["rewards"], old, samples, GAMMA, LAM, bootstrap)
        at = SampledTokens(torch.arange(len(cells)), samples, EPISODES)
        behaviour = logits.detach().log_softmax(-1)[cells, actions]
        for _ in range(EPOCHS):
            log_probs = logits.log_softmax(-1)[cells, actions]
            given = PolicyTokens(at, log_probs, behaviour, sign * whiten(advantages))
            policy = objective(given).losses.mean()
            critic = value_losses(values[cells], old, returns, torch.full_like(old, 0.2))[0].mean()
            optimizer.zero_grad()
            (policy + critic).backward()
            optimizer.step()
    return logits.detach(), values.detach()


def value_of(logits: torch.Tensor) -> float:
    """Expected discounted reward from START, exactly, by solving Bellman's equations (without a limit of steps)."""
    right = logits.softmax(-1)[:, 1]
    inner = range(1, CELLS - 1)
    system, paid = torch.eye(len(inner), dtype=torch.float64), torch.zeros(len(inner), dtype=torch.float64)
    for i, cell in enumerate(inner):
        for chance, following in ((right[cell], cell + 1), (1 - right[cell], cell - 1)):
            if following in inner:
                system[i, following - 1] -= GAMMA * chance
            else:
                paid[i] += chance * (RIGHT_END if following else LEFT_END)
    return torch.linalg.solve(system, paid)[START - 1].item()


def test_ppo_reaches_the_optimum():
    before = value_of(torch.zeros(CELLS, 2, dtype=torch.float64))
    logits, values = train(clip)
    assert before < 0.5 * OPTIMUM
    assert value_of(logits) > 0.95 * OPTIMUM
    assert (logits.argmax(-1)[1:-1] == 1).all()
    optimal = [GAMMA ** (CELLS - 2 - cell) for cell in range(1, CELLS - 1)]
    assert (values[1:-1] - torch.tensor(optimal)).abs().max() < 0.15


def test_with_the_sign_turned_it_does_not():
    assert value_of(train(clip, sign=-1.0)[0]) < 0.4 * OPTIMUM


def test_without_bounds_of_use_the_policy_leaves_its_samples():
    """The clip's purpose: four epochs move the ratio less with a bound than without."""

    def drift(objective: PolicyObjective) -> float:
        logits, _ = train(objective, updates=1)
        return (logits.log_softmax(-1) - torch.zeros_like(logits).log_softmax(-1))[1:-1].abs().max().item()

    assert drift(partial(clip, low=0.02)) < 0.7 * drift(partial(clip, low=0.99, high=1e6))
