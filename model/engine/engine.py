"""The inference engine: continuous batching over a paged latent cache.

Rollouts, distillation, evaluation, chat and serving all generate here. Requests are submitted at any time;
each `step` reads some new tokens of every running request, decoding rows beside pieces of prompts, and says
what came out. Finished rows leave at once and waiting ones take their places.
Legend: n sampled positions, O vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.engine.batching import assemble
from model.engine.draft import draft
from model.engine.errors import RequestError
from model.engine.forward import Forward
from model.engine.pages import PAGE, Pages, chain
from model.engine.request import Completion, Request, Update
from model.engine.rows import Row, Rows, Span, pages_for
from model.engine.sampling import Rules, choose
from model.engine.stopping import StopStrings
from model.engine.weights import Weights
from model.transformer import Transformer

NOT_FINITE = "the model's output is not finite: its weights hold NaN or infinity, or overflow on this prompt"


@dataclass
class Figures:
    """What an engine has done since it was made."""

    steps: int = 0
    prompt_tokens: int = 0
    """Tokens of the prompts that were submitted."""
    reused_tokens: int = 0
    """Tokens that a row found in the cache when it began, or began again."""
    made_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    """Times that a row gave its pages back and began again."""

    @property
    def acceptance(self) -> float:
        """Share of drafts that were accepted, 0 before there was one."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else 0.0


class Engine:
    """`max_rows` bounds the batch and `chunk` the prompt tokens of a step. Prompt and answer together must
    fit `context`, the model's own by default; a larger one asks for more than the model was trained for.
    `cache_tokens` bounds the cache (0: enough for every row at full context; memory is taken as needed).

    `invariant`: an answer's bits do not depend on what else is in the batch (see `model.engine.tiles`).
    Without it they do, as far as rounding goes, and where two tokens are about as good the choice may turn
    on it. `drafts`: how many tokens the prediction module guesses ahead, which changes no more than that.
    `token_bytes`: what each id stands for, needed for stop strings.
    """

    def __init__(
        self,
        model: Transformer,
        stop_ids: Sequence[int],
        *,
        max_rows: int = 128,
        context: int = 0,
        token_bytes: Sequence[bytes] | None = None,
        invariant: bool = False,
        drafts: int = 0,
        chunk: int = 2048,
        cache_tokens: int = 0,
    ) -> None:
        if drafts and not model.mtp:
            raise RequestError(
                "the engine was asked for drafts, but this model has no prediction module: set drafts to 0"
            )
        least = (
            ("max_rows", max_rows, 1),
            ("chunk", chunk, 1),
            ("context", context, 0),
            ("drafts", drafts, 0),
        )
        for name, value, smallest in (*least, ("cache_tokens", cache_tokens, 0)):
            if value < smallest:
                raise RequestError(f"{name} is {value}: it must be at least {smallest}")
        c = model.config
        self.model = model
        self.context = context or c.max_position_embeddings
        self.stop_ids = frozenset(stop_ids)
        self.token_bytes = token_bytes
        self.drafts = drafts
        self.figures = Figures()
        self.weights = Weights(model, draft=drafts > 0)
        pages = -(-cache_tokens // PAGE) or max_rows * pages_for(self.context, drafts)
        layers = c.num_hidden_layers + (drafts > 0)
        self.pages = Pages(layers, c.latent_dim, self.weights.dtype, model.embed_tokens.device, pages)
        self._rows = Rows(self.pages, max_rows, chunk, self.context, drafts)
        self._forward = Forward(model, self.weights, self.pages, invariant)
        self._live: dict[int, Row] = {}
        self._next = 0
        self._rules: tuple[list[Row], Rules] | None = None

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self._live)

    @property
    def rows(self) -> int:
        """Requests in the batch."""
        return len(self._rows.running)

    @property
    def waiting(self) -> int:
        """Requests that are not in the batch yet."""
        return self._rows.idle

    def submit(self, request: Request) -> int:
        """Queue a request; returns the ticket that its updates carry.

        RequestError (a ValueError) when the prompt is empty, leaves no room in the context, has ids outside
        the vocabulary, or could never fit the cache.
        """
        prompt, sampling = tuple(request.prompt), request.sampling
        if not prompt or len(prompt) >= self.context:
            raise RequestError(
                f"a prompt of {len(prompt)} tokens; between 1 and {self.context - 1} fit this model's "
                f"context of {self.context}"
            )
        vocabulary = self.model.config.vocab_size
        if odd := [i for i in prompt if not (isinstance(i, int) and 0 <= i < vocabulary)]:
            raise RequestError(
                f"the prompt holds token {odd[0]!r}, and the model's vocabulary has {vocabulary}: it was "
                "made with another tokenizer"
            )
        if sampling.stop and self.token_bytes is None:
            raise RequestError("sampling.stop needs an engine that was given token_bytes")
        longest = min(self.context, len(prompt) + sampling.max_tokens)
        if (need := pages_for(longest, self.drafts)) > self.pages.limit:
            raise RequestError(
                f"prompt and answer may take {longest} tokens and with them {need} pages of {PAGE}, and the "
                f"cache has {self.pages.limit}: lower max_tokens or raise cache_tokens"
            )
        stop = StopStrings(sampling.stop, self.token_bytes or ()) if sampling.stop else None
        row = Row(self._next, Request(prompt, sampling), list(prompt), stop, chain(b"", prompt))
        self._next += 1
        self._live[row.ticket] = row
        self._rows.add(row)
        self.figures.prompt_tokens += len(prompt)
        return row.ticket

    def cancel(self, ticket: int) -> None:
        """Forget a request; no more updates come for it. A finished one's ticket is no error."""
        row = self._live.pop(ticket, None)
        if row is not None:
            self._rows.finish(row)

    def refresh(self, model: Transformer | None = None) -> None:
        """Read the weights again, or another model's of the same shape, between the steps of training say.

        Rows that are running go on with the latents they have; nothing cached serves later requests.
        `generate` does it by itself when the model has been trained on.
        """
        model = model or self.model
        if model.config != self.model.config or model.precision != self.model.precision:
            raise RequestError("the new weights are of another configuration or precision: make a new engine")
        self.model = model
        self.weights = Weights(model, draft=self.drafts > 0)
        self._forward.model, self._forward.weights = model, self.weights
        self.forget()

    def forget(self) -> None:
        """Let nothing that is cached serve later requests; running ones go on with what they have."""
        self._rows.forget()

    def reset(self) -> None:
        """Forget every request and all that is cached."""
        self._live.clear()
        self.pages.reset()
        old = self._rows
        self._rows = Rows(self.pages, old.max_rows, old.chunk, self.context, self.drafts)
        self._rows.reused, self._rows.preemptions = old.reused, old.preemptions

    @torch.inference_mode()
    def step(self) -> list[Update]:
        """Read new tokens of every running request once; what came out, nothing when idle.

        When it raises, or is interrupted, every request is lost and the engine is idle and whole.
        """
        try:
            return self._step()
        except BaseException:
            self.reset()
            raise

    def _step(self) -> list[Update]:
        rows = self._rows
        rows.admit()
        spans = rows.spans()
        if not spans:
            return []
        self.pages.clean()
        self.figures.steps += 1
        self.figures.reused_tokens, self.figures.preemptions = rows.reused, rows.preemptions
        news = [(s.row, s.start, self._new_tokens(s)) for s in spans]
        batch, places = assemble(news, rows.table, width=1 + self.drafts)
        hidden_SD = self._forward.hidden(batch)
        updates, read = self._sample(spans, places, hidden_SD)
        ended = {update.ticket for update in updates if update.finish is not None}
        if self.drafts and read:
            draft(self._forward, rows, read, hidden_SD, ended)
        for row, _, _ in read:
            rows.publish(row, row.cached)
        for ticket in ended:
            rows.finish(self._live.pop(ticket))
        return updates

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Completions in the order of the requests. RequestError names one that cannot be served.

        The engine must be idle, since updates of others would be lost. An interrupted call leaves nothing
        behind that a later one would have to work on.
        """
        if self._live:
            raise RequestError(
                "generate() needs an idle engine: collect what was submitted with step() first"
            )
        if self.weights.stale:
            self.refresh()
        done: dict[int, Completion] = {}
        try:
            for number, request in enumerate(requests):
                try:
                    done[self.submit(request)] = Completion()
                except RequestError as error:
                    raise type(error)(f"request {number}: {error}") from None
            while self.busy:
                for update in self.step():
                    done[update.ticket].add(update)
                    if update.finish == "failed":
                        number = list(done).index(update.ticket)
                        raise RequestError(f"request {number}: {NOT_FINITE}")
        except BaseException:
            self.reset()
            raise
        return list(done.values())

    @staticmethod
    def _new_tokens(span: Span) -> list[int]:
        own = span.row.tokens[span.start : span.start + span.count]
        return own + span.row.drafts if span.ends else own

    def _sample(
        self, spans: list[Span], places: list[int], hidden_SD: Tensor
    ) -> tuple[list[Update], list[tuple[Row, int, list[int]]]]:
        """Choose what follows the spans that end their rows, and take over the drafts that it confirms.

        Also returns for each row from which position on it was read for good, and where the states of those
        tokens lie in `hidden_SD`.
        """
        flat: list[int] = []
        owners: list[Row] = []
        made: list[int] = []
        for span, place in zip(spans, places, strict=True):
            if span.ends:
                ahead = len(span.row.drafts) + 1
                flat += range(place + span.count - 1, place + span.count - 1 + ahead)
                owners += [span.row] * ahead
                made += range(span.row.made, span.row.made + ahead)
        tokens, log_probs = self._choose(hidden_SD, flat, owners, made) if flat else ([], [])
        updates: list[Update] = []
        read: list[tuple[Row, int, list[int]]] = []
        at = 0
        for span, place in zip(spans, places, strict=True):
            row, count = span.row, span.count
            if span.ends:
                ahead = len(row.drafts) + 1
                update = self._accept(row, tokens[at : at + ahead], log_probs[at : at + ahead])
                at += ahead
                updates.append(update)
                if update.finish == "failed":
                    continue
                count += len(update.tokens) - 1
            row.cached += count
            read.append((row, span.start, list(range(place, place + count))))
        return updates, read

    def _choose(
        self, hidden_SD: Tensor, flat: list[int], owners: list[Row], made: list[int]
    ) -> tuple[list[int], list[float]]:
        """Tokens at the given places of the batch, and their log-probabilities at temperature 1."""
        device = hidden_SD.device
        if self._rules is None or self._rules[0] != owners:
            self._rules = owners, Rules.of([row.request.sampling for row in owners], device)
        whole = len(flat) == len(hidden_SD)
        states = hidden_SD if whole else hidden_SD.index_select(0, torch.tensor(flat, device=device))
        logits_nO, total_n = self._forward.logits(states)
        tokens_n = choose(logits_nO, self._rules[1], self._rules[1].draws(made))
        picked_n = logits_nO.gather(1, tokens_n[:, None]).squeeze(1)
        return tokens_n.tolist(), (picked_n - total_n).tolist()

    def _accept(self, row: Row, tokens: list[int], log_probs: list[float]) -> Update:
        """The tokens that stand: the first, and each after a draft that was right."""
        self.figures.drafted_tokens += len(row.drafts)
        finite = next((i for i, one in enumerate(log_probs) if not math.isfinite(one)), len(log_probs))
        if not finite:
            return Update(row.ticket, (), (), "failed")
        # What is not finite behind a draft is no token. The next step begins with it, and fails.
        tokens, log_probs = tokens[:finite], log_probs[:finite]
        finish = stopped_by = None
        taken = 0
        for number, token in enumerate(tokens):
            taken += 1
            row.tokens.append(token)
            row.made += 1
            stopped_by = row.stop.feed(token) if row.stop else None
            if token in self.stop_ids or stopped_by is not None:
                finish = "stop"
            elif row.made >= row.request.sampling.max_tokens or len(row.tokens) >= self.context:
                finish = "length"
            if finish or number == len(row.drafts) or token != row.drafts[number]:
                break
        self.figures.accepted_tokens += taken - 1
        self.figures.made_tokens += taken
        row.drafts = []
        return Update(row.ticket, tuple(tokens[:taken]), tuple(log_probs[:taken]), finish, stopped_by)
