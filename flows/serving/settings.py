"""What can be set about the server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Limits of the server. Times are in seconds."""

    max_rows: int = 128
    """Sequences in the batch at a time."""
    max_queue: int = 512
    """Sequences that may wait for a place in it."""
    max_tokens: int = 1024
    """Longest answer to a request that gives no limit of its own."""
    max_body: int = 4 << 20
    """Bytes of a request's body."""
    read_timeout: float = 30.0
    """For a request to come in: once for its headers, once for its body."""
    write_timeout: float = 60.0
    """For a client to take something of its answer."""
    drain: float = 30.0
    """For answers to be finished when the server ends."""
    max_choices: int = 64
    """Sequences that one request may ask for."""
