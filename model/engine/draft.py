"""Speculative decoding with the multi-token prediction module (report §5.4.3).

The module reads the main model's state at a position and the token after it, and predicts the token after
that one. Its guesses ride along in the next step; as far as the main model chooses the same tokens, several
come out of one step.

A draft is accepted when it *is* the token that the main model's distribution gives at the request's own draw
for that position, so an answer is the same with drafts and without, greedy or sampled. Drafts are drawn with
the same number, which makes both models choose alike where they agree. (Accepting with probability p/q would
take a few drafts more, at the price of answers that depend on the drafts.)

A model whose weights hold NaN is another matter: a wrong draft that meets one fails its own request.

The module's latents lie in the cache beside the main model's: what it makes of the token at a position lies
at that position. Position 0 stays empty, since no state comes before it.
Legend: S tokens, D hidden, n drafting rows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from model.engine.batching import assemble
from model.engine.forward import Forward
from model.engine.rows import Row, Rows
from model.engine.sampling import Rules, choose


def draft(
    forward: Forward,
    rows: Rows,
    read: Sequence[tuple[Row, int, list[int]]],
    hidden_SD: Tensor,
    ended: Collection[int],
) -> None:
    """Read new tokens into the module's cache and leave each drafting row its guesses.

    `read` lists rows with the position before their first new token, and where the state of the token before
    each of them lies in `hidden_SD`. The tokens themselves are the rows' own. Rows whose tickets have `ended`
    get no guesses, but what they leave in the cache serves others.
    """
    spans = [(row, start + 1, row.tokens[start + 1 : start + 1 + len(flat)]) for row, start, flat in read]
    batch, places = assemble(spans, rows.table, first=1, width=1 + rows.drafts)
    index = torch.zeros(len(batch.tokens), dtype=torch.int64)
    for (_, _, flat), place in zip(read, places, strict=True):
        index[place : place + len(flat)] = torch.tensor(flat)
    state_SD = forward.drafted(hidden_SD.index_select(0, index.to(hidden_SD.device)), batch)
    last = [
        (row, place + len(tokens) - 1)
        for (row, start, tokens), place in zip(spans, places, strict=True)
        if start + len(tokens) == len(row.tokens) and row.ticket not in ended
    ]
    if not last:
        return
    drafting = [row for row, _ in last]
    rules = Rules.of([row.request.sampling for row in drafting], forward.device)
    state_nD = state_SD.index_select(0, torch.tensor([at for _, at in last], device=forward.device))
    for row in drafting:
        row.drafts = []
    for number in range(rows.drafts):
        draws_n = rules.draws([row.made + number for row in drafting])
        guesses = choose(forward.logits(state_nD, draft=True)[0], rules, draws_n).tolist()
        for row, guess in zip(drafting, guesses, strict=True):
            row.drafts.append(guess)
        if number + 1 == rows.drafts:
            return
        # Further guesses build on the module's own states. The next step writes over what they leave.
        ahead = [
            (row, len(row.tokens) + number, [guess]) for row, guess in zip(drafting, guesses, strict=True)
        ]
        batch, places = assemble(ahead, rows.table, first=1)
        state_nD = forward.drafted(state_nD, batch).index_select(
            0, torch.tensor(places, device=forward.device)
        )
