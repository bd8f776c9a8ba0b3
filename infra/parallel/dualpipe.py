"""DualPipe: micro-batches enter at both ends, and a forward one way hides the all-to-all of a backward the
other way (report §3.2.1, Figure 5)."""

from __future__ import annotations

from infra.parallel.actions import Schedule
from infra.parallel.program import Chunk, Demands, Phase, unroll

NAME = "dualpipe"
DEMANDS = Demands(multiple=2, micro_multiple=2, per_stage=2)


def dualpipe(stages: int, micro_batches: int) -> Schedule:
    """The DualPipe schedule: bubble (PP/2-1)(F&B+B-3W), two copies, PP+1 micro-batches live (Table 2).

    Rank r holds stage r for the micro-batches that enter at rank 0, the first half, and stage PP-1-r for
    those that enter at the last rank. The two halves of the ranks run the same program, mirrored.

    Raises:
        ConfigError: `stages` or `micro_batches` is odd, or there are fewer than two micro-batches a stage.
    """
    DEMANDS.check(NAME, stages, micro_batches)
    each = micro_batches // 2
    down, up = range(each), range(each, micro_batches)
    programs = []
    for rank in range(stages):
        mirrored = rank >= stages // 2
        place = stages - 1 - rank if mirrored else rank
        entering, returning = (up, down) if mirrored else (down, up)
        chunks = [Chunk(place, entering), Chunk(stages - 1 - place, returning)]
        programs.append(unroll(eight_steps(place, stages // 2, each), chunks))
    ranks = tuple(range(stages))
    return Schedule(NAME, stages, micro_batches, tuple(programs), homes=(ranks, ranks[::-1]))


def eight_steps(place: int, places: int, micro_batches: int) -> tuple[Phase, ...]:
    """The program of the rank that stands `place` ranks from its end, where the middle is `places` away.

    Chunk 0 is the stage near the micro-batches' entry, chunk 1 the one near their exit; `micro_batches` pass
    through each. What ends a micro-batch's backward early, I before W, stands where a stage waits for it.
    """
    inward = places - 1 - place
    outward = place + 1
    steady = micro_batches - 2 * places + outward
    # On the two middle ranks the first pair is left apart: across the middle a stage waits for its forward,
    # which need not wait for its backward.
    apart = 1 if inward == 0 else 0
    return (
        # 1. Fill the stages further in.
        (2 * inward, "F0"),
        # 2. The first micro-batches of the other chunk arrive.
        (outward, "F0 F1"),
        # 3. The first backwards return; their weight halves fill the time.
        (inward, "I1 W F1"),
        # 4. The steady state: everything overlapped.
        (apart, "F0 B1 F1&B0"),
        (steady - apart, "F0&B1 F1&B0"),
        # 5. No more enters chunk 0.
        (inward, "B1 F1&B0"),
        # 6. No more enters at all; of these backwards the later half leaves its weights for the end.
        (outward // 2, "B1 B0"),
        (outward % 2, "B1 I0"),
        (outward // 2, "I1 I0"),
        # 7. Drain chunk 0, weight halves in the waits.
        (inward, "W I0"),
        # 8. The weight halves that are left.
        (outward, "W"),
    )
