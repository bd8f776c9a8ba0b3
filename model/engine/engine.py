"""Generation: latent cache, absorbed decoding, rows that leave the batch when they finish.

Prompts are read in the expanded form and then every step runs in the absorbed form on cached latents.
Requests wait in a queue; when enough rows have finished, the batch is compacted and refilled. Requests with
the same prompt share one reading of it, as the samples of a GRPO group do.
Legend: B rows, L cache length, W latent width (C + R), D hidden, O vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from model.engine.sampling import Sampling, choose, uniforms
from model.transformer import Transformer


@dataclass(frozen=True)
class Request:
    """Token ids to continue, and this request's own random seed."""

    prompt: tuple[int, ...]
    seed: int = 0


@dataclass
class Completion:
    """Generated ids (the stop token included), the log-probability of each under the untempered model, and
    why generation ended: "stop" or "length"."""

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish: str = "length"


class Engine:
    """`max_rows` bounds the batch. Prompt and answer together must fit `context`, the model's own by default;
    a larger one asks the model for more than it was trained for."""

    def __init__(
        self, model: Transformer, stop_ids: Sequence[int], max_rows: int = 128, context: int = 0
    ) -> None:
        self.model = model.eval()
        self.context = context or model.config.max_position_embeddings
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.long, device=model.embed_tokens.device)
        self.max_rows = max_rows

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Completions in the order of the requests. ValueError names a prompt that does not fit."""
        context = self.context
        for index, request in enumerate(requests):
            if not request.prompt or len(request.prompt) >= context:
                raise ValueError(
                    f"request {index}: a prompt of {len(request.prompt)} tokens; between 1 and "
                    f"{context - 1} fit this model's context of {context}"
                )
        self.model.eval()
        done = [Completion() for _ in requests]
        # Longest first, so that rows of a batch are alike in length and little cache is empty.
        queue = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt))
        batch = _Batch(self.model)
        while queue or batch.rows:
            if queue and len(batch.rows) <= self.max_rows // 2:
                taken, queue = (
                    queue[: self.max_rows - len(batch.rows)],
                    queue[self.max_rows - len(batch.rows) :],
                )
                batch.admit(taken, [requests[i] for i in taken])
            tokens_B, log_probs_B = batch.sample(sampling)
            stopped_B = torch.isin(tokens_B, self.stop_ids)
            for row, token, log_prob in zip(batch.rows, tokens_B.tolist(), log_probs_B.tolist(), strict=True):
                done[row].tokens.append(token)
                done[row].log_probs.append(log_prob)
            full_B = (batch.made_B + 1 >= sampling.max_tokens) | (batch.lengths_B + 1 >= context)
            for row, stopped in zip(batch.rows, stopped_B.tolist(), strict=True):
                if stopped:
                    done[row].finish = "stop"
            batch.advance(tokens_B, ~(stopped_B | full_B))
        return done


class _Batch:
    """Rows being generated, their cached latents, and the logits of each one's next token."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        c = model.config
        device = self.device = model.embed_tokens.device
        dtype = model.precision.activation_dtype
        self.rows: list[int] = []
        self.caches = [torch.empty(0, 0, c.latent_dim, device=device, dtype=dtype) for _ in model.layers]
        self.lengths_B = torch.empty(0, dtype=torch.long, device=device)
        self.made_B = torch.empty(0, dtype=torch.long, device=device)
        self.seeds_B = torch.empty(0, dtype=torch.long, device=device)
        self.logits_BO = torch.empty(0, c.vocab_size, device=device)

    def admit(self, rows: list[int], requests: list[Request]) -> None:
        """Read the prompts, each distinct one once, and add their rows."""
        distinct = sorted({r.prompt for r in requests}, key=lambda p: (-len(p), p))
        place = {prompt: i for i, prompt in enumerate(distinct)}
        expand = torch.tensor([place[r.prompt] for r in requests], device=self.device)
        lengths = torch.tensor([len(p) for p in distinct], device=self.device)
        caches, logits = self._prefill(distinct, lengths)
        new_lengths = lengths[expand]
        self.caches = [_stack(old, new[expand]) for old, new in zip(self.caches, caches, strict=True)]
        self.logits_BO = torch.cat((self.logits_BO, logits[expand]))
        self.lengths_B = torch.cat((self.lengths_B, new_lengths))
        self.made_B = torch.cat((self.made_B, torch.zeros_like(new_lengths)))
        self.seeds_B = torch.cat((self.seeds_B, torch.tensor([r.seed for r in requests], device=self.device)))
        self.rows += rows

    def _prefill(self, prompts: list[tuple[int, ...]], lengths: Tensor) -> tuple[list[Tensor], Tensor]:
        """Latents and last-position logits of right-padded prompts: causal masking hides the padding."""
        longest = int(lengths.max())
        tokens_BT = torch.tensor([[*p, *([0] * (longest - len(p)))] for p in prompts], device=self.device)
        cos, sin = self.model.rotation(longest)
        x = F.embedding(tokens_BT, self.model.embed_tokens).to(self.model.precision.activation_dtype)
        caches = []
        for layer in self.model.layers:
            normed = layer.input_layernorm(x)
            latents = layer.self_attn.latents(normed, cos, sin)
            x = x + layer.self_attn.expanded(layer.self_attn.queries(normed, cos, sin), latents, None)
            x, _ = layer.feed_forward(x)
            caches.append(latents)
        last = x[torch.arange(len(prompts), device=self.device), lengths - 1]
        return caches, self.model.logits(self.model.norm(last))

    def sample(self, sampling: Sampling) -> tuple[Tensor, Tensor]:
        """Next token of every row and its log-probability at temperature 1."""
        draws_B = uniforms(self.seeds_B, self.made_B) if sampling.temperature > 0 else self.made_B.double()
        tokens_B = choose(self.logits_BO, sampling.temperature, sampling.top_p, draws_B)
        log_probs_B = torch.log_softmax(self.logits_BO, -1).gather(1, tokens_B[:, None]).squeeze(1)
        return tokens_B, log_probs_B

    def advance(self, tokens_B: Tensor, alive_B: Tensor) -> None:
        """Feed the sampled tokens; finished rows leave first."""
        if not bool(alive_B.all()):
            keep = alive_B.nonzero().squeeze(1)
            longest = int(self.lengths_B[keep].max()) if len(keep) else 0
            self.rows = [self.rows[i] for i in keep.tolist()]
            self.caches = [cache[keep, :longest] for cache in self.caches]
            self.lengths_B, self.made_B = self.lengths_B[keep], self.made_B[keep]
            self.seeds_B, tokens_B = self.seeds_B[keep], tokens_B[keep]
            if not self.rows:
                self.logits_BO = self.logits_BO[:0]
                return
        self.logits_BO = self._decode(tokens_B)
        self.lengths_B = self.lengths_B + 1
        self.made_B = self.made_B + 1

    def _decode(self, tokens_B: Tensor) -> Tensor:
        """One absorbed step: write each row's latent at its own position, attend, and score the next
        token."""
        longest = int(self.lengths_B.max()) + 1
        if self.caches[0].shape[1] < longest:
            # Grown in steps, so that copying is rare.
            self.caches = [F.pad(cache, (0, 0, 0, longest + 31 - cache.shape[1])) for cache in self.caches]
        cos, sin = (table[self.lengths_B] for table in self.model.rotation(longest))
        blocked_BL = torch.arange(longest, device=self.device) > self.lengths_B[:, None]
        blocked = blocked_BL if bool(blocked_BL.any()) else None
        every = torch.arange(len(self.rows), device=self.device)
        x = F.embedding(tokens_B, self.model.embed_tokens).to(self.model.precision.activation_dtype)
        for layer, cache in zip(self.model.layers, self.caches, strict=True):
            normed = layer.input_layernorm(x)
            cache[every, self.lengths_B] = layer.self_attn.latents(normed, cos, sin)
            query = layer.self_attn.queries(normed, cos, sin)
            x = x + layer.self_attn.absorbed(query, cache[:, :longest], blocked)
            x = layer.feed_forward(x[:, None])[0][:, 0]
        return self.model.logits(self.model.norm(x))


def _stack(old: Tensor, new: Tensor) -> Tensor:
    """Concatenate rows of caches of different lengths, padded with zeros to the longer one."""
    longest = max(old.shape[1], new.shape[1])
    return torch.cat([F.pad(cache, (0, 0, 0, longest - cache.shape[1])) for cache in (old, new)])
