"""Training under fp8: networks in FP8, weights quantised once a step, the same bits whichever way."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels.layers.weight
from kernels.layers.linear import fp8_linear
from model.allocations import allocations
from model.experts import RoutedExperts
from model.gate import Gate
from model.lanes import Lanes
from model.moe import MoE
from model.precision import steady_weights
from model.recompute import recomputing
from tests.model.tiny import TINY, tiny, tokens
from tests.model.training import Rows, run

WIDE = {"hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 384, "num_attention_heads": 4}


def losses(folder) -> list[str]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [line.partition('"tokens_per_second"')[0] for line in lines]


def loss(line: str) -> float:
    return float(line.partition('"loss": ')[2].partition(",")[0])


def one_by_one(self, x, counts, weights_P1) -> Tensor:
    """The experts as single linear layers, with nothing fused and everything between them in bfloat16."""
    values = x if isinstance(x, Tensor) else one_by_one.rows.pop()
    outputs = []
    for part, gate_up, down in zip(
        values.split(counts.tolist()), self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True
    ):
        gate, up = fp8_linear(part, gate_up, power_of_two=True).chunk(2, dim=-1)
        outputs.append(fp8_linear(F.silu(gate) * up, down, power_of_two=True))
    return torch.cat(outputs) * weights_P1.to(values.dtype)


def test_training_follows_the_experts_one_by_one(tmp_path, monkeypatch) -> None:
    """The same data, start and routing; roundings differ, what is learned does not.

    Tokens are held to the experts of the first run: left to itself, routing sends one in ten elsewhere on the
    last bit of a score, and how far five updates carry that depends on the CPU.
    """
    settings = {"steps": 5, "lr": 0.004, "micro_rows": 2, "mtp_weight": 0.0}
    select, chosen = Gate.select, []

    def record(self, biased_SE):
        chosen.append(select(self, biased_SE))
        return chosen[-1]

    monkeypatch.setattr(Gate, "select", record)
    run(tmp_path, tiny(precision="fp8"), Rows(4, 24), **settings)
    found = [loss(line) for line in losses(tmp_path)]
    (tmp_path / "log.jsonl").unlink()
    assert len(chosen) == 5 * 2 * 2  # steps, micro-batches, MoE layers

    dispatch = MoE._dispatch_fp8

    def dispatch_values(self, x_SD, routing):
        sent = dispatch(self, x_SD, routing)
        one_by_one.rows = [x_SD.index_select(0, sent.token_P)]
        return sent

    monkeypatch.setattr(Gate, "select", lambda self, biased_SE: chosen.pop(0))
    monkeypatch.setattr(MoE, "_dispatch_fp8", dispatch_values)
    monkeypatch.setattr(RoutedExperts, "forward", one_by_one)
    run(tmp_path, tiny(precision="fp8"), Rows(4, 24), **settings)
    expected = [loss(line) for line in losses(tmp_path)]
    assert not chosen
    assert len(found) == len(expected) == 5
    assert expected[-1] < 0.95 * expected[0]
    apart = [abs(a / b - 1) for a, b in zip(found, expected, strict=True)]
    assert apart[0] < 1e-3  # nothing has been learned yet
    assert max(apart) < 0.02
    assert found != expected


def test_lanes_and_recomputing_change_no_bit(tmp_path) -> None:
    states, logs = [], []
    for lanes, recompute in ((1, False), (3, False), (2, True)):
        model = tiny(precision="fp8")
        settings = {"rows": 3, "micro_rows": 1, "lr": 0.01, "bias_speed": 0.01, "recompute": recompute}
        run(tmp_path, model, Rows(20, 12, documents=2), steps=2, lanes=lanes, **settings)
        states.append(model.state_dict())
        logs.append(losses(tmp_path))
    assert all(torch.equal(value, other[name]) for other in states[1:] for name, value in states[0].items())
    assert all(log == logs[0] for log in logs)


def step(model, tokens_BT) -> float:
    states = model(tokens_BT, mtp=True).states_BTD
    total = sum(model.logits(state).square().mean() for state in states)
    total.backward()
    return float(total.detach())


def test_a_steps_gradients_are_those_of_autograd() -> None:
    """With FP8 copies and gradients added where they are made, or without either: the same bits."""
    items = [tokens(2, 9, seed=seed) for seed in range(2)]
    found = []
    for steady in (False, True):
        model = tiny(precision="fp8").train()
        with steady_weights([model.precision]) if steady else nullcontext():
            results = [step(model, item) for item in items]
        found.append((results, {name: p.grad for name, p in model.named_parameters()}))
    assert found[0][0] == found[1][0]
    for name, gradient in found[0][1].items():
        assert gradient.any(), name
        assert torch.equal(gradient, found[1][1][name]), name


def test_gradients_go_where_the_backward_pass_finds_them() -> None:
    """`zero_grad` between the passes, as many loops have it, takes away no gradient; and what the loss does
    not reach gets none, so that no optimizer moves it."""
    found = []
    for steady in (False, True):
        model = tiny(precision="fp8").train()
        with steady_weights([model.precision]) if steady else nullcontext():
            step(model, tokens(1, 9))
            loss = model.logits(model(tokens(2, 9), mtp=True).states_BTD[0]).square().mean()
            model.zero_grad()
            loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert any(gradient is None for gradient in found[0].values())
    for name, gradient in found[0].items():
        if gradient is None:
            assert found[1][name] is None, name
        else:
            assert torch.equal(found[1][name], gradient), name


def test_a_buffer_that_cannot_take_a_gradient_is_named() -> None:
    model = tiny(precision="fp8").train()
    weight = model.layers[0].self_attn.o_proj
    weight.grad = torch.zeros_like(weight).t().contiguous().t()
    with steady_weights([model.precision]), pytest.raises(ValueError, match="needs a contiguous"):
        step(model, tokens(1, 9))


def test_copies_are_those_of_the_scope_and_of_no_other_model() -> None:
    model = tiny(precision="fp8").train()
    with steady_weights([model.precision]):
        outer = model.precision.copies
        twin = copy.deepcopy(model)
        assert twin.precision.copies is None
        with torch.no_grad(), steady_weights([model.precision]):  # a model is evaluated during a step
            assert model.precision.copies is not outer
            model(tokens(1, 9))
        assert model.precision.copies is outer
        expected = step(model, tokens(1, 9))
        assert step(twin, tokens(1, 9)) == expected
    assert model.precision.copies is None
    with pytest.raises(ArithmeticError), steady_weights([model.precision]):
        raise ArithmeticError
    assert model.precision.copies is None


def test_each_weight_is_quantised_once_a_step(monkeypatch) -> None:
    made: list[torch.Size] = []
    original = kernels.layers.weight.FP8Weight.__init__

    def counted(self, weight, *arguments):
        made.append(weight.shape)
        original(self, weight, *arguments)

    monkeypatch.setattr(kernels.layers.weight.FP8Weight, "__init__", counted)
    monkeypatch.setattr("kernels.layers.operand.quantize_weight", None)  # nothing else quantises a weight
    model = tiny(precision="fp8")
    with Lanes(model, 2) as lanes:
        for steps in (1, 2):
            lanes.gradients(step, [tokens(1, 9, seed=seed) for seed in range(3)])
            inner = [
                p.shape
                for name, p in model.named_parameters()
                if p.dim() > 1 and not name.startswith(("embed", "lm_head")) and ".gate.weight" not in name
            ]
            assert sorted(made) == sorted(inner * steps)
            with torch.no_grad():  # between steps weights may change
                model.layers[0].self_attn.o_proj.add_(0.1)
    assert all(replica.precision.copies is None for replica in lanes.replicas)


def test_counts_of_experts_stay_on_the_device() -> None:
    moe = tiny(precision="fp8").layers[1].mlp.train()
    x = torch.randn(2, 17, TINY.hidden_size, generator=torch.Generator().manual_seed(5)).bfloat16()
    y, routing = moe(x)
    sent = moe.dispatch(x, routing)
    assert isinstance(sent.counts, Tensor)
    assert torch.equal(sent.counts.float(), routing.load_E)
    assert torch.equal(
        moe.experts(sent.x_PD, sent.counts.tolist(), sent.weights_P1),
        moe.experts(sent.x_PD, sent.counts, sent.weights_P1),
    )
    valid = torch.rand(2, 17, generator=torch.Generator().manual_seed(6)) < 0.5
    load = moe.gate(x, valid).load_E
    kept = routing.experts_SK[valid.flatten()].flatten()
    assert torch.equal(load, torch.bincount(kept, minlength=TINY.n_routed_experts).float())
    assert y.shape == x.shape


def test_activations_wait_in_a_byte() -> None:
    """What a forward pass keeps, against the same model in bfloat16."""

    def held(precision: str, recompute: bool = False) -> int:
        model, batch = tiny(precision=precision, **WIDE).train(), tokens(4, 64)

        def forward():
            with steady_weights([model.precision]), recomputing(recompute):
                return model(batch)

        forward()  # tables that are made once
        return allocations(forward)[1]

    assert held("fp8") < 0.75 * held("bf16")
    assert held("fp8", True) < held("fp8")
