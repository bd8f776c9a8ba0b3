"""Micro-batches side by side: the same bits as one after the other."""

import copy

import pytest
import torch

from model.lanes import Lanes
from tests.model.tiny import tiny, tokens
from tests.model.training import Rows, run


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_number_of_lanes_changes_no_bit(tmp_path, optimizer):
    """Five micro-batches a step, so that the last wave is not full."""
    states, logs = [], []
    for lanes in (1, 2, 3):
        model = tiny()
        settings = {"rows": 9, "micro_rows": 2, "lr": 0.01, "optimizer": optimizer, "bias_speed": 0.01}
        run(tmp_path, model, Rows(20, 16, documents=2), steps=3, lanes=lanes, **settings)
        states.append(model.state_dict())
        lines = (tmp_path / "log.jsonl").read_text().splitlines()
        logs.append([line.partition('"tokens_per_second"')[0] for line in lines])
    assert all(torch.equal(value, other[name]) for other in states[1:] for name, value in states[0].items())
    assert logs[0] == logs[1] == logs[2]
    assert len(logs[0]) == 3


def loss(model, tokens_BT):
    states = model(tokens_BT).states_BTD[0]
    model.logits(states).square().mean().backward()
    return float(states.detach().sum())


def test_replicas_share_the_weights_and_have_their_own_gradients():
    model = tiny()
    items = [tokens(1, 9, seed=seed) for seed in range(4)]
    alone = copy.deepcopy(model)
    # One lane is one operator thread and the model itself: the bits that any number of lanes must give.
    with Lanes(alone, 1) as single:
        expected = single.gradients(loss, items)
    with Lanes(model, 3) as lanes:
        assert lanes.gradients(loss, items) == expected
        for replica in lanes.replicas[1:]:
            assert all(
                a.data_ptr() == b.data_ptr()
                for a, b in zip(model.state_dict().values(), replica.state_dict().values(), strict=True)
            )
            assert all(p.grad is None for p in replica.parameters())
        for mine, theirs in zip(model.parameters(), alone.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None)
            assert mine.grad is None or torch.equal(mine.grad, theirs.grad)
        # A step in place is seen by every lane, routing biases included.
        with torch.no_grad():
            model.lm_head.add_(1.0)
            model.gates()[0].e_score_correction_bias.add_(1.0)
        for name, value in model.state_dict().items():
            assert torch.equal(lanes.replicas[2].state_dict()[name], value)


def test_threads_are_as_before_afterwards_and_an_error_in_a_lane_arrives():
    seen = []

    def fail(model, item):
        seen.append(torch.get_num_threads())
        if item == 1:
            raise ArithmeticError("lane")

    def step():
        with Lanes(tiny(), 2) as lanes:
            lanes.gradients(fail, [0, 1, 2])

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ArithmeticError, match="lane"):
            step()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1]
