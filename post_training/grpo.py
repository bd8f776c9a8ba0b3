"""Group Relative Policy Optimization: the group's mean is the baseline, no critic (report §5.2.2, R1 §2.2.1).

The report writes the objective for whole outputs and publishes neither group size nor clip, beta or
learning rate. Here ratio, clip and KL are taken token by token, and the sum over a batch is divided by its
number of response tokens, so that no output weighs more a token for being short. Advantages divide by the
group's population standard deviation; a group whose rewards are all equal teaches nothing and has advantage
zero.
Legend: N rollouts, G samples a group, B rows of a micro-batch, T positions, S response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.chat import PAD
from model.optim.build import Optimizer
from model.transformer import Transformer
from post_training.rollout import Rollout


@dataclass(frozen=True)
class GRPOConfig:
    groups: int = 16
    """Problems a step."""
    group_size: int = 8
    """Responses a problem (G)."""
    clip: float = 0.2
    """Epsilon: how far the probability ratio may move before its gradient stops."""
    beta: float = 0.02
    """Weight of the KL divergence to the reference policy, inside the objective."""
    updates: int = 1
    """Optimizer steps on each batch of rollouts."""
    min_spread: float = 0.0
    """Least standard deviation that advantages are divided by. Where a reward model only adds to rules, a
    group that the rules find equal would otherwise be ranked by its noise, at full size."""
    micro_tokens: int = 8192
    """Tokens whose activations are held at once."""

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(
                f"grpo.group_size is {self.group_size}: a group of one has no baseline; use 2 or more"
            )
        if self.groups < 1 or self.updates < 1:
            raise ValueError("grpo.groups and grpo.updates must be at least 1")


def advantages(rewards_N: Tensor, group_size: int, min_spread: float = 0.0) -> Tensor:
    """(r - mean) / max(std, min_spread) within each group of consecutive rollouts, zero where all are equal:
    float32 [N].

    ValueError when the rollouts do not make whole groups.
    """
    if len(rewards_N) % group_size:
        raise ValueError(f"{len(rewards_N)} rewards do not make groups of {group_size}")
    # In double precision and by range: the mean of equal rewards may differ from them by a rounding error,
    # which divided by its own standard deviation would be an advantage like any other.
    groups = rewards_N.double().view(-1, group_size)
    differ = groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True) > 1e-6
    spread = groups.std(dim=1, correction=0, keepdim=True).clamp(min=min_spread)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return torch.where(differ, centred / torch.where(differ, spread, 1.0), 0.0).flatten().float()


@dataclass
class _MicroBatch:
    tokens_BT: Tensor
    response_BT: Tensor  # bool [B, T-1]: the next token belongs to the response
    advantage_S: Tensor
    reference_S: Tensor  # log-probabilities under the reference policy
    old_S: Tensor | None  # under the policy that sampled; None when that is the current one


def response_log_probs(model: Transformer, tokens_BT: Tensor, response_BT: Tensor) -> Tensor:
    """log p of every response token at temperature 1, float32 [S], differentiable."""
    states_SD = model(tokens_BT).states_BTD[0][:, :-1][response_BT]
    log_probs = torch.log_softmax(model.logits(states_SD), -1)
    return log_probs.gather(1, tokens_BT[:, 1:][response_BT][:, None]).squeeze(1)


def update(
    model: Transformer,
    reference: Transformer,
    optimizer: Optimizer,
    rollouts: Sequence[Rollout],
    rewards_N: Tensor,
    config: GRPOConfig,
) -> dict[str, float]:
    """Take `config.updates` optimizer steps on one batch of rollouts; returns the figures of the last one.

    Rollouts of a group stand next to each other. Both models are left in evaluation mode: only the router's
    balance loss, which has no place here, tells the modes apart.
    """
    advantage_N = advantages(rewards_N, config.group_size, config.min_spread)
    figures: dict[str, float] = {}
    batches = _micro_batches(model, reference, rollouts, advantage_N, config)
    tokens = sum(batch.advantage_S.numel() for batch in batches)
    for _ in range(config.updates):
        kl_sum, clipped_sum, objective_sum = 0.0, 0.0, 0.0
        for batch in batches:
            log_probs = response_log_probs(model, batch.tokens_BT, batch.response_BT)
            old_S = log_probs.detach() if batch.old_S is None else batch.old_S
            ratio = torch.exp(log_probs - old_S)
            bounded = ratio.clamp(1 - config.clip, 1 + config.clip)
            gain = torch.minimum(ratio * batch.advantage_S, bounded * batch.advantage_S)
            gap = batch.reference_S - log_probs
            kl = torch.exp(gap) - gap - 1
            objective = (gain - config.beta * kl).sum() / tokens
            (-objective).backward()
            objective_sum += float(objective.detach())
            kl_sum += float(kl.detach().sum())
            clipped_sum += float((ratio.detach() != bounded.detach()).sum())
        norm = optimizer.step(1.0)
        figures = {
            "objective": objective_sum,
            "kl": kl_sum / tokens,
            "clipped": clipped_sum / tokens,
            "grad_norm": norm,
        }
    return figures


def _micro_batches(
    model: Transformer,
    reference: Transformer,
    rollouts: Sequence[Rollout],
    advantage_N: Tensor,
    config: GRPOConfig,
) -> list[_MicroBatch]:
    """Rollouts sorted by length and padded only to their neighbours, with both fixed policies' scores.

    With one update a batch the sampling policy is the current one: its log-probabilities are those of the
    first forward pass, so they are not computed a second time.
    """
    lengths = [len(r.prompt_ids) + len(r.response_ids) for r in rollouts]
    order = sorted(range(len(rollouts)), key=lambda i: (-lengths[i], i))
    batches: list[_MicroBatch] = []
    start = 0
    device = model.embed_tokens.device
    model.eval()
    reference.eval()
    while start < len(order):
        longest = lengths[order[start]]
        part = order[start : start + max(1, config.micro_tokens // longest)]
        start += len(part)
        # Filled on the CPU, sent to the model's device whole.
        tokens_BT = torch.full((len(part), longest), PAD)
        response_BT = torch.zeros(len(part), longest, dtype=torch.bool)
        for row, index in enumerate(part):
            rollout = rollouts[index]
            tokens_BT[row, : lengths[index]] = torch.tensor(rollout.prompt_ids + rollout.response_ids)
            response_BT[row, len(rollout.prompt_ids) : lengths[index]] = True
        counts = response_BT.sum(1)
        advantage_S = advantage_N[torch.tensor(part)].repeat_interleave(counts).to(device)
        tokens_BT, response_BT = tokens_BT.to(device), response_BT[:, 1:].to(device)
        with torch.no_grad():
            reference_S = response_log_probs(reference, tokens_BT, response_BT)
            old_S = response_log_probs(model, tokens_BT, response_BT) if config.updates > 1 else None
        batches.append(_MicroBatch(tokens_BT, response_BT, advantage_S, reference_S, old_S))
    return batches
