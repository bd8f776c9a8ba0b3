"""One pass of the model over new tokens of many requests at once, on top of what the cache holds.

The new tokens of a step lie one after the other in one flat batch, whatever request they belong to. Products
run over all of them; attention alone looks at rows. A few new tokens of a request (decoding, drafts) attend
in the absorbed form over the cache; a stretch of prompt attends in the expanded form.

In the invariant mode all tokens take the absorbed form, one by one, and everything runs on tiles of fixed
shape (see `model.engine.tiles`): a token's bits depend on the tokens before it and on nothing else.
Legend: S new tokens, B decoding rows, T new tokens a decoding row, H heads, N content width, R rotary width,
K = N + R, W latent width (C + R), C key-value rank, V value width, Q query rank, D hidden, L positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model.attention import attend
from model.engine.experts import mixed, mixed_invariant, route
from model.engine.pages import PAGE, Pages
from model.engine.reading import CHUNK, Every, Paged, Plan, gathered, own_pages, plan, read, read_invariant
from model.engine.tiles import tiled
from model.engine.weights import AttentionWeights, BlockWeights, ExpertWeights, Weights, opened
from model.transformer import Transformer


@dataclass
class Stretch:
    """Consecutive new tokens of one prompt: its page table, where they begin in the flat batch and in the
    prompt, and how many there are."""

    table_P: np.ndarray
    flat: int
    start: int
    count: int


@dataclass
class Batch:
    """The new tokens of a step: B * T tokens of decoding rows, T a row, and then stretches of prompt."""

    tokens: list[int]
    positions: np.ndarray  # [S]
    slots: np.ndarray  # [S], where each token's latent is written
    table_BP: np.ndarray  # page tables of the decoding rows
    width: int  # T
    stretches: list[Stretch]
    first: int = 0
    """Cached positions before this one hold nothing (see `model.engine.draft`)."""


@dataclass
class _Step:
    """A batch as the layers read it."""

    turn: Tensor  # complex [S, 1, R/2], the rotation of each token
    slots_S: Tensor
    decoding: int  # tokens of the decoding rows
    width: int
    plan: Plan | Paged | None
    stretches: list[Stretch]
    first: int
    every: Every | None = None
    """What the invariant mode reads."""


class Forward:
    """Runs layers over batches and writes the cache. `pages.latents[i]` belongs to layer i, and the one after
    the last to the drafting module."""

    def __init__(self, model: Transformer, weights: Weights, pages: Pages, invariant: bool) -> None:
        self.model, self.weights, self.pages, self.invariant = model, weights, pages, invariant
        self.config = model.config
        self.device = model.embed_tokens.device
        self._turns = torch.empty(0, device=self.device)

    def hidden(self, batch: Batch) -> Tensor:
        """States of every new token before the final norm: [S, D]."""
        step = self._step(batch)
        x_SD = self.weights.embed(torch.tensor(batch.tokens, device=self.device))
        for layer, latents in zip(self.weights.layers, self.pages.latents, strict=False):
            x_SD = self._block(layer, x_SD, latents, step)
        return x_SD

    def drafted(self, hidden_SD: Tensor, batch: Batch) -> Tensor:
        """States of the drafting module: `hidden_SD` belongs to the token before each of the batch's."""
        draft = self.weights.draft
        assert draft is not None
        step = self._step(batch)
        embedded = self.weights.embed(torch.tensor(batch.tokens, device=self.device))

        def joined(tokens: Tensor, hidden: Tensor) -> tuple[Tensor]:
            return (draft.join(torch.cat((draft.token_norm(tokens), draft.hidden_norm(hidden)), -1)),)

        (x_SD,) = self._rows(joined, embedded, hidden_SD)
        return self._block(draft.block, x_SD, self.pages.latents[-1], step)

    def logits(self, hidden_SD: Tensor, draft: bool = False) -> tuple[Tensor, Tensor]:
        """Scores over the vocabulary of states before their norm, float32 [S, O], and the log of the sum of
        their exponentials [S]."""
        norm = self.weights.draft.norm if draft and self.weights.draft else self.weights.norm

        def scored(x: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.weights.logits(norm(x))
            return logits, logits.logsumexp(-1)

        logits_SO, total_S = self._rows(scored, hidden_SD)
        return logits_SO, total_S

    def _rows(self, function: Callable[..., tuple[Tensor, ...]], *rows: Tensor) -> tuple[Tensor, ...]:
        """`function` over rows, on tiles in the invariant mode."""
        return tiled(function, *rows) if self.invariant else function(*rows)

    def _step(self, batch: Batch) -> _Step:
        positions = torch.from_numpy(batch.positions).to(self.device)
        turn = self._rotation(int(batch.positions.max()) + 1)[positions, None]
        decoding = len(batch.table_BP) * batch.width
        step = _Step(
            turn,
            torch.from_numpy(batch.slots).to(self.device),
            decoding,
            batch.width,
            None,
            batch.stretches,
            batch.first,
        )
        if self.invariant:
            step.every = self._every(batch)
        elif decoding:
            seen_BT = batch.positions[:decoding].reshape(-1, batch.width) + 1
            step.plan = plan(batch.table_BP, seen_BT, self.device, batch.first)
        return step

    def _every(self, batch: Batch) -> Every:
        """Each token's own page table, in whole chunks, and how many positions it sees."""
        seen = batch.positions + 1
        table_SP = np.zeros((len(seen), -(-int(seen.max()) // CHUNK) * (CHUNK // PAGE)), dtype=np.int64)
        decoding = np.repeat(batch.table_BP, batch.width, 0)
        table_SP[: len(decoding), : decoding.shape[1]] = decoding[:, : table_SP.shape[1]]
        for s in batch.stretches:
            pages = s.table_P[: -(-(s.start + s.count) // PAGE)]
            table_SP[s.flat : s.flat + s.count, : len(pages)] = pages
        return Every(torch.from_numpy(own_pages(table_SP)).to(self.device), seen, batch.first)

    def _rotation(self, length: int) -> Tensor:
        """e^(i angle) of every position and pair, complex [length or more, R/2]."""
        if self._turns.shape[0] < length:
            # Doubled, so that it is not made anew at every step.
            cos, sin = self.model.rotation(max(length, 2 * self._turns.shape[0]))
            self._turns = torch.complex(cos, sin)
        return self._turns

    def _block(self, w: BlockWeights, x_SD: Tensor, latents: Tensor, step: _Step) -> Tensor:
        a = w.attention
        content_SHN, rotary_SHR, new_SW = self._rows(lambda x, t: self._project(a, x, t), x_SD, step.turn)
        latents.index_copy_(0, step.slots_S, new_SW)
        if self.invariant:
            (query_SHW,) = self._rows(lambda c, r: (self._absorb(a, c, r),), content_SHN, rotary_SHR)
            assert step.every is not None
            mixed_SHC = read_invariant(query_SHW, latents, self.config.kv_lora_rank, step.every)
            (out_SV,) = self._rows(lambda m: (self._values(a, m),), mixed_SHC)
        else:
            out_SV = self._attend(a, content_SHN, rotary_SHR, new_SW, latents, step)
        return self._feed_forward(w, x_SD, out_SV)

    def _project(self, w: AttentionWeights, x_SD: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Content and rotary parts of the queries, [S, H, N] and [S, H, R], and the new latents [S, W]."""
        c = self.config
        down = w.down(w.input_norm(x_SD))
        raw_SQ, latent_SC, key_SR = down.split((c.q_lora_rank, c.kv_lora_rank, c.qk_rope_head_dim), -1)
        query = w.up_query(w.query_norm(raw_SQ)).unflatten(-1, (c.num_attention_heads, -1))
        content, rotary = query.split((c.qk_nope_head_dim, c.qk_rope_head_dim), -1)
        # The shared key turns with the heads' queries, as one head more.
        both = torch.cat((rotary, key_SR[:, None]), 1)
        pairs = torch.view_as_complex(both.float().unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(pairs * turn).flatten(-2).to(both.dtype)
        return content, turned[:, :-1], torch.cat((w.latent_norm(latent_SC), turned[:, -1]), -1)

    def _absorb(self, w: AttentionWeights, content_SHN: Tensor, rotary_SHR: Tensor) -> Tensor:
        """Queries on latents, [S, H, W]: the keys' expansion moved into the query."""
        moved = torch.bmm(content_SHN.transpose(0, 1), w.up_key_HNC).transpose(0, 1)
        return torch.cat((moved, rotary_SHR), -1)

    def _values(self, w: AttentionWeights, mixed_SHC: Tensor) -> Tensor:
        """Weighted latents of every head expanded into values, [S, H * V]."""
        return torch.bmm(mixed_SHC.transpose(0, 1), w.up_value_HCV).transpose(0, 1).flatten(1)

    def _attend(
        self,
        w: AttentionWeights,
        content_SHN: Tensor,
        rotary_SHR: Tensor,
        new_SW: Tensor,
        latents: Tensor,
        step: _Step,
    ) -> Tensor:
        """Attention of every new token, [S, H * V]."""
        n, parts = step.decoding, []
        if step.plan is not None:
            query_SHW = self._absorb(w, content_SHN[:n], rotary_SHR[:n])
            mixed_BTHC = read(
                query_SHW.unflatten(0, (-1, step.width)), latents, self.config.kv_lora_rank, step.plan
            )
            parts.append(self._values(w, mixed_BTHC.flatten(0, 1)))
        if step.stretches:
            query_SHK = torch.cat((content_SHN[n:], rotary_SHR[n:]), -1)
            parts.append(self._expanded(w, query_SHK, new_SW, latents, step))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _expanded(
        self, w: AttentionWeights, query_SHK: Tensor, new_SW: Tensor, latents: Tensor, step: _Step
    ) -> Tensor:
        """Stretches of prompt in the expanded form; beginnings of about one length go together."""
        alike: dict[tuple[str, int], list[Stretch]] = {}
        for s in step.stretches:
            fresh = s.start == 0 and not step.first
            alike.setdefault(("fresh", -(-s.count // PAGE)) if fresh else ("goes on", s.flat), []).append(s)
        out = query_SHK.new_empty(
            query_SHK.shape[0], self.config.num_attention_heads * self.config.v_head_dim
        )
        for (kind, _), stretches in alike.items():
            # Padding is at the end, where no token looks.
            query = pad_sequence([_part(query_SHK, s, step.decoding) for s in stretches], batch_first=True)
            if kind == "fresh":
                known = pad_sequence([_part(new_SW, s) for s in stretches], batch_first=True)
                answer = self._dense(w, query, known, None)
            else:
                known, mask = self._so_far(latents, stretches[0], step.first)
                answer = self._dense(w, query, known, mask)
            for s, rows in zip(stretches, answer, strict=True):
                _part(out, s, step.decoding)[:] = rows[: s.count]
        return out

    def _so_far(self, latents: Tensor, s: Stretch, first: int) -> tuple[Tensor, Tensor]:
        """The cache up to the end of a stretch, [1, L, W], and what each token sees of it, [T, L]."""
        end = s.start + s.count
        pages = torch.from_numpy(s.table_P[: -(-end // PAGE)]).to(self.device)
        own_T1 = torch.arange(s.start, end, device=self.device)[:, None]
        mask = torch.arange(first, end, device=self.device) <= own_T1
        return gathered(latents, pages)[None, first:end], mask

    def _dense(
        self, w: AttentionWeights, query_BTHK: Tensor, known_BLW: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attention over latents expanded into keys and values: [B, T, H * V]."""
        c = self.config
        latent, rotary = known_BLW.split((c.kv_lora_rank, c.qk_rope_head_dim), -1)
        both = w.up_key_value(latent.reshape(-1, c.kv_lora_rank)).unflatten(-1, (c.num_attention_heads, -1))
        content, values = both.unflatten(0, known_BLW.shape[:2]).split((c.qk_nope_head_dim, c.v_head_dim), -1)
        shared = rotary.unsqueeze(-2).expand(-1, -1, c.num_attention_heads, -1)
        keys = torch.cat((content, shared), -1).transpose(1, 2)
        # Fused attention wants equal widths.
        wide = torch.nn.functional.pad(values, (0, max(0, c.qk_head_dim - c.v_head_dim))).transpose(1, 2)
        out = attend(query_BTHK.transpose(1, 2), keys, wide, 1.0, mask)[..., : c.v_head_dim]
        return out.transpose(1, 2).flatten(2)

    def _feed_forward(self, w: BlockWeights, x_SD: Tensor, out_SV: Tensor) -> Tensor:
        mlp = w.mlp
        if not isinstance(mlp, ExpertWeights):

            def dense(x: Tensor, out: Tensor) -> tuple[Tensor]:
                x = w.attention.out.add_to(x, out)
                return (mlp.down.add_to(x, opened(mlp.gate_up(w.post_norm(x)))),)

            return self._rows(dense, x_SD, out_SV)[0]

        def before(x: Tensor, out: Tensor) -> tuple[Tensor, ...]:
            x = w.attention.out.add_to(x, out)
            normed = w.post_norm(x)
            if mlp.shared is not None:
                x = mlp.shared.down.add_to(x, opened(mlp.shared.gate_up(normed)))
            return (x, normed, *route(mlp, normed))

        x_SD, normed_SD, experts_SK, weights_SK = self._rows(before, x_SD, out_SV)
        mix = mixed_invariant if self.invariant else mixed
        return x_SD + mix(mlp, normed_SD, experts_SK, weights_SK)


def _part(flat: Tensor, stretch: Stretch, skipped: int = 0) -> Tensor:
    """A stretch's rows of a flat tensor that leaves out the first `skipped` tokens."""
    return flat[stretch.flat - skipped : stretch.flat - skipped + stretch.count]
