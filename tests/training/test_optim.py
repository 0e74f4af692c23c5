import pytest
import torch

from minimind import ModelConfig
from minimind.modeling import Model
from minimind.training.arguments import StageArgs
from minimind.training.optim import build_optimizers, lr_factor
from minimind.training.rl.actor_critic import ActorCritic

CONFIG = ModelConfig(
    32, 1, 2, 1, 16, 48, 50, num_experts=2, num_experts_per_tok=1, num_shared_experts=1, moe_intermediate_size=24
)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_schedules_warm_up_and_end_where_they_should(schedule, steps):
    warmup = max(1, steps // 50)
    factors = [lr_factor(schedule, step, steps, warmup) for step in range(steps)]
    assert all(0 < f <= 1 for f in factors)
    assert factors[warmup - 1] == 1.0
    if steps > 2:
        assert factors[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)
        after = factors[warmup - 1 :]
        assert after == sorted(after, reverse=True)
    if schedule == "wsd" and steps == 1000:
        assert factors[799] == 1.0 > factors[801]


def test_the_cooldown_begins_and_ends_at_the_right_steps():
    factors = [lr_factor("wsd", step, 100, 1, final=0.0, cooldown=0.5) for step in range(100)]
    assert factors[49] == 1.0 > factors[50] and factors[-1] == 0.0
    assert factors[74] == pytest.approx(0.5)
    assert lr_factor("cosine", 99, 100, 1, final=0.3) == pytest.approx(0.3)


def test_a_root_cooldown_falls_fast_at_first():
    factors = [lr_factor("wsd-sqrt", step, 100, 1, final=0.2, cooldown=0.5) for step in range(100)]
    assert factors[49] == 1.0 and factors[-1] == pytest.approx(0.2)
    assert factors[61] == pytest.approx(1 - 0.8 * 0.24**0.5) and factors[1:] == sorted(factors[1:], reverse=True)


def test_momentum_rises_from_jordans():
    args = StageArgs(momentum_warmup=0.5)
    assert [args.momentum(step, 100) for step in (0, 25, 50, 99)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert StageArgs(momentum_warmup=0.5, muon_momentum=0.8).momentum(0, 100) == 0.8
    assert StageArgs().momentum(0, 100) == 0.95
    optimizers = build_optimizers(Model(CONFIG), "muon", 1e-2, 0.1)
    optimizers.set_momentum(0.9)
    assert optimizers.parts[1].param_groups[0]["momentum"] == 0.9


def test_rates_and_means_reach_their_parameters():
    model = Model(CONFIG)
    optimizers = build_optimizers(model, "muon", 1e-2, 0.1, (0.8, 0.9), momentum=0.7)
    optimizers.set_rate([model.embed_tokens.weight], 3.0)
    optimizers.set_rate([p for n, p in model.named_parameters() if n.endswith("layernorm.weight")], 0.0)
    adamw, muon = (part.param_groups for part in optimizers.parts)
    layer = model.layers[0]
    embedding, norms = adamw[2:]
    assert embedding["params"] == [model.embed_tokens.weight] and embedding["weight_decay"] == 0.1
    assert norms["params"] == [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
    assert norms["weight_decay"] == 0 and {group["betas"] for group in adamw} == {(0.8, 0.9)}
    assert muon[0]["momentum"] == 0.7
    optimizers.set_lr_factor(0.5)
    assert [group["lr"] for group in (embedding, norms, muon[0])] == pytest.approx([1.5e-2, 0, 5e-3])


def test_every_parameter_is_in_exactly_one_group():
    for name in ("muon", "adamw"):
        model = Model(CONFIG)
        optimizers = build_optimizers(model, name, 1e-3, 0.1)
        optimizers.set_rate([model.embed_tokens.weight], 0.5)
        ids = [id(p) for part in optimizers.parts for g in part.param_groups for p in g["params"]]
        assert sorted(ids) == sorted(id(p) for p in model.parameters())
        assert len(optimizers.parts) == (2 if name == "muon" else 1)


def test_norm_gains_do_not_decay_and_matrices_do():
    for name in ("muon", "adamw"):
        model = Model(CONFIG)
        optimizers = build_optimizers(model, name, 1e-2, 0.5)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizers.set_lr_factor(0.5)
        optimizers.step()
        for n, p in model.named_parameters():
            shrink = 1.0 if p.ndim == 1 else 1 - 0.5 * 1e-2 * 0.5
            torch.testing.assert_close(p, before[n] * shrink, msg=n)


def test_muon_takes_a_critics_matrices_as_it_takes_the_policys():
    model = ActorCritic.from_policy(Model(CONFIG))
    optimizers = build_optimizers(model, "muon", 1e-2, 0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    taken = {names[id(p)] for group in optimizers.parts[1].param_groups for p in group["params"]}
    assert taken == {f"{side}{n}" for side in ("", "critic.") for n in taken if not n.startswith("critic.")}
    assert "critic.layers.0.self_attn.qkv_proj.weight" in taken


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_critic_has_its_own_rate(name):
    model = ActorCritic.from_policy(Model(CONFIG))
    optimizers = build_optimizers(model, name, 1e-2, 0.1)
    own = {id(p) for p in model.critic.parameters()}
    optimizers.set_rate(model.critic.parameters(), 3.0)
    optimizers.set_lr_factor(0.5)
    groups = [group for part in optimizers.parts for group in part.param_groups]
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates == {id(p): pytest.approx(0.015 if id(p) in own else 0.005) for p in model.parameters()}
    assert sum(len(group["params"]) for group in groups) == len(rates)
    decays = {
        n: g["weight_decay"] for n, p in model.named_parameters() for g in groups if any(p is q for q in g["params"])
    }
    assert all((decays[n] > 0) == (p.ndim > 1) for n, p in model.named_parameters())


def test_optimizer_state_resumes_exactly():
    def run(steps, state=None, weights=None):
        torch.manual_seed(0)
        model = Model(CONFIG)
        optimizers = build_optimizers(model, "muon", 1e-2, 0.1)
        if weights is not None:
            model.load_state_dict(weights)
            optimizers.load_state_dict(model, state)
        for step in steps:
            optimizers.set_lr_factor(1 / (1 + step))
            ids = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(step))
            model(ids).logits.square().mean().backward()
            optimizers.step()
            optimizers.zero_grad()
        return {k: v.clone() for k, v in model.state_dict().items()}, optimizers.state_dict(model)

    whole, _ = run(range(6))
    half, state = run(range(3))
    resumed, _ = run(range(3, 6), state, half)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_muon_takes_the_blocks_matrices_and_moves_each_as_far_as_adamw_would():
    """Not the router, whose rows are scores, nor embeddings and gains. An update is 0.2 * lr large on average whatever
    the shape (Liu et al. 2025, arXiv 2502.16982, equation 4)."""
    model = Model(CONFIG)
    optimizers = build_optimizers(model, "muon", 1e-2, 0.0)
    names = {id(p): n for n, p in model.named_parameters()}
    taken = {names[id(p)] for group in optimizers.parts[1].param_groups for p in group["params"]}
    assert taken == {n for n, p in model.named_parameters() if "layers" in n and p.ndim > 1 and "router" not in n}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizers.set_lr_factor(1.0)
    optimizers.step()
    for name, parameter in model.named_parameters():
        if name in taken:
            moved = (parameter - before[name]).flatten(0, -2)
            assert 0.15 < moved.square().mean().sqrt() / 1e-2 < 0.25, name
