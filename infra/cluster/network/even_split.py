"""How ranks that belong together lie on nodes."""

from __future__ import annotations

from math import isqrt


def even_split(ranks: int, most: int) -> tuple[int, int]:
    """(nodes, ranks in each): equal parts on as few nodes as can hold them, at most `most` ranks on one.

    Up to `most` ranks lie in one node, whether they divide it or not: what the node has over is left to
    others, as 64 of the 72 GPUs that NVLink joins in a GB200 NVL72. Of 128 on nodes of 72 half lie in each of
    two. Ranks that no number of nodes shares evenly, such as 73, each count as a node of their own: one ring
    over all of them, every step of which waits for the network.
    """
    small = [n for n in range(1, isqrt(ranks) + 1) if ranks % n == 0]
    nodes = min(n for d in small for n in (d, ranks // d) if ranks <= n * most)
    return nodes, ranks // nodes
