"""Muon's orthogonalisation, and which parameter gets which optimizer."""

import copy

import pytest
import torch

from model.optim.adamw import BF16MomentAdamW
from model.optim.build import Optimizer, OptimizerConfig, build_optimizer
from model.optim.muon import Muon, orthogonalize
from tests.model.tiny import tiny


@pytest.mark.parametrize("shape", [(1, 24, 24), (3, 10, 40), (3, 40, 10), (2, 1, 7)])
def test_singular_values_end_up_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 37.0
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.25


def test_singular_vectors_stay():
    matrix = torch.randn(1, 12, 30, generator=torch.Generator().manual_seed(1))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.mT @ orthogonalize(matrix) @ v.mT
    off = inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))
    assert float(off.abs().max()) < 1e-3
    assert float((orthogonalize(matrix) * matrix).sum()) > 0


def test_no_gradient_moves_nothing_and_gives_no_nan():
    assert not orthogonalize(torch.zeros(2, 5, 7)).any()
    weight = torch.nn.Parameter(torch.ones(5, 7))
    optimizer = Muon([weight, torch.nn.Parameter(torch.ones(3, 3))], lr=0.1)
    weight.grad = torch.zeros(5, 7)
    optimizer.step()
    assert torch.equal(weight, torch.ones(5, 7))


def test_stacked_experts_are_stepped_as_so_many_matrices():
    generator = torch.Generator().manual_seed(2)
    stacked = torch.nn.Parameter(torch.randn(3, 8, 5, generator=generator))
    single = [torch.nn.Parameter(matrix.clone()) for matrix in stacked.detach()]
    together, apart = Muon([stacked], lr=0.1), Muon(single, lr=0.1)
    for _ in range(3):
        # Gradients of very different size: each matrix is scaled on its own.
        stacked.grad = (
            torch.randn(3, 8, 5, generator=generator) * torch.tensor([1.0, 1e-3, 1e3])[:, None, None]
        )
        for parameter, gradient in zip(single, stacked.grad, strict=True):
            parameter.grad = gradient.clone()
        together.step()
        apart.step()
    assert torch.allclose(stacked, torch.stack(single), atol=1e-5)


def test_tall_matrices_take_longer_steps():
    """sqrt(max(1, rows / columns)): the step's effect on outputs does not depend on the shape."""
    sizes = []
    for rows, columns in ((8, 8), (32, 8), (8, 32)):
        weight = torch.nn.Parameter(torch.zeros(rows, columns))
        weight.grad = torch.eye(rows, columns)
        Muon([weight], lr=1.0).step()
        sizes.append(float(torch.linalg.svdvals(weight.detach()).mean()))
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=0.05)
    assert sizes[2] == pytest.approx(sizes[0], rel=0.05)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_descends_a_badly_scaled_quadratic(weight_decay):
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(12, 20, generator=generator)
    inputs = torch.randn(20, 256, generator=generator) * torch.logspace(0, -2, 20)[:, None]
    weight = torch.nn.Parameter(torch.zeros(12, 20))
    optimizer = Muon([weight], lr=0.1, weight_decay=weight_decay)
    losses = []
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 200)
        loss = ((weight - target) @ inputs).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < (1e-3 if weight_decay == 0 else 0.1) * losses[0]


def of(optimizer: Optimizer, kind: type) -> set[str]:
    """Names of the parameters that an optimizer of one kind steps."""
    ids = {
        id(p)
        for part in optimizer.parts
        if isinstance(part, kind)
        for group in part.param_groups
        for p in group["params"]
    }
    return {name for name, p in optimizer.named if id(p) in ids}


def test_muon_takes_the_matrices_of_layers_and_adamw_the_rest():
    model = tiny()
    optimizer = build_optimizer(model, OptimizerConfig(name="muon"))
    inner, outer = of(optimizer, Muon), of(optimizer, torch.optim.AdamW)
    assert inner | outer == {name for name, _ in model.named_parameters()}
    assert not inner & outer
    assert {"embed_tokens", "lm_head", "norm.weight", "layers.1.mlp.gate.weight"} <= outer
    assert {"layers.1.mlp.experts.down_proj", "layers.0.self_attn.kv_a_proj", "mtp.0.eh_proj"} <= inner
    assert all(p.dim() > 1 for name, p in model.named_parameters() if name in inner)
    assert len(build_optimizer(model, OptimizerConfig()).parts) == 1


def test_decay_is_for_matrices_only():
    model = tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.01, weight_decay=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.5)
    for name, parameter in model.named_parameters():
        factor = 1 - 0.005 * 0.1 if parameter.dim() > 1 else 1.0
        assert torch.allclose(parameter, before[name] * factor, rtol=1e-6), name


def test_the_gradient_norm_is_measured_before_and_bounded_by_clipping():
    model = tiny()
    optimizer = build_optimizer(model, OptimizerConfig(clip=1.0))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    elements = sum(p.numel() for p in model.parameters())
    assert optimizer.step(0.0) == pytest.approx(2 * elements**0.5, rel=1e-4)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_goes_to_a_checkpoint_and_back(name):
    def stepped(model, optimizer, seeds):
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step(1.0)
        return model.state_dict()

    whole, halved = tiny(), tiny()
    config = OptimizerConfig(name=name, lr=1e-2, muon_lr=1e-2)
    expected = stepped(whole, build_optimizer(whole, config), range(4))
    first = build_optimizer(halved, config)
    stepped(halved, first, range(2))
    second = build_optimizer(halved, config)
    second.load_state_tensors(first.state_tensors())
    found = stepped(halved, second, range(2, 4))
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    with pytest.raises(ValueError, match=r"'layers\.9\.x'"):
        second.load_state_tensors({"layers.9.x.exp_avg": torch.zeros(1)})


@pytest.mark.parametrize(("arguments", "field"), [({"name": "sgd"}, "name"), ({"clip": 0.0}, "clip")])
def test_settings_out_of_bounds_are_named(arguments, field):
    with pytest.raises(ValueError, match=rf"optimizer\.{field}"):
        OptimizerConfig(**arguments)


def test_bf16_moments_step_as_fp32_ones_do_but_for_rounding():
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(40, 30, generator=generator) * 10**-k for k in (0, 3, 1, 0, 2)]
    found = []
    for moments in ("fp32", "bf16"):
        model = torch.nn.Linear(30, 40, bias=False)
        torch.nn.init.constant_(model.weight, 0.5)
        optimizer = Optimizer(model, OptimizerConfig(lr=1e-2, weight_decay=0.1, moments=moments))
        for gradient in gradients:
            model.weight.grad = gradient.clone()
            optimizer.apply(1.0)
        found.append((model.weight.detach(), optimizer.state_tensors()))
    (plain, _), (rounded, state) = found
    assert {t.dtype for key, t in state.items() if "exp_avg" in key} == {torch.bfloat16}
    moved = (plain - 0.5).abs().max()
    assert 0 < (plain - rounded).abs().max() < 0.02 * moved
    with pytest.raises(ValueError, match="beta2"):
        Optimizer(model, OptimizerConfig(moments="bf16", beta2=0.999))
    with pytest.raises(ValueError, match="moments"):
        OptimizerConfig(moments="fp16")


def bf16_moments(*shapes: tuple[int, ...]) -> tuple[list[torch.nn.Parameter], BF16MomentAdamW]:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    groups = [{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:]}]
    return parameters, BF16MomentAdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)


def fill(parameters: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_a_parameter_without_a_gradient_is_left_out_and_keeps_its_own_count():
    (first, second, vector), optimizer = bf16_moments((4, 3), (5, 2), (6,))
    fill([first, second, vector], 1)
    second.grad = None
    before = second.detach().clone()
    optimizer.step()
    assert torch.equal(second, before)
    assert second not in optimizer.state
    fill([first, second, vector], 2)
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in (first, second, vector)] == [2, 1, 2]
    # Its first step is that of a fresh optimizer.
    (_, alone, _), fresh = bf16_moments((4, 3), (5, 2), (6,))
    alone.grad = second.grad
    fresh.step()
    assert torch.equal(second, alone)


def test_each_group_has_its_own_decay():
    parameters, optimizer = bf16_moments((4, 3), (5, 2), (6,))
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    before = [p.detach().clone() for p in parameters]
    optimizer.step()
    for parameter, value, factor in zip(parameters, before, (0.999, 0.999, 1.0), strict=True):
        assert torch.equal(parameter, value * factor)


def test_bf16_moments_survive_a_copy_of_the_optimizer_and_any_gradient():
    parameters, optimizer = bf16_moments((40, 30), (5, 2), (6,))
    fill(parameters, 1)
    optimizer.step()
    twins, twin = copy.deepcopy((parameters, optimizer))
    fill(parameters, 2)
    fill(twins, 2)
    twins[0].grad = twins[0].grad.t().contiguous().t()  # the same values, other strides
    optimizer.step()
    twin.step()
    for parameter, other in zip(parameters, twins, strict=True):
        assert torch.equal(parameter, other)
        state = optimizer.state[parameter]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16


def test_bf16_moments_go_to_a_checkpoint_and_back():
    def stepped(model, optimizer, seeds):
        for seed in seeds:
            fill(list(model.parameters()), seed)
            optimizer.step(1.0)
        return model.state_dict()

    whole, halved = tiny(), tiny()
    config = OptimizerConfig(lr=1e-2, moments="bf16")
    expected = stepped(whole, build_optimizer(whole, config), range(4))
    first = build_optimizer(halved, config)
    stepped(halved, first, range(2))
    second = build_optimizer(halved, config)
    second.load_state_tensors(first.state_tensors())
    found = stepped(halved, second, range(2, 4))
    assert all(torch.equal(found[key], value) for key, value in expected.items())
