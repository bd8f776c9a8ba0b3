"""Figures that others published, to stand beside the planner's own. Nothing here is ever computed with,
except where a plan says that it was given a figure from outside.

Sources: V3 is the DeepSeek-V3 report (arXiv 2412.19437v2), ISCA the DeepSeek paper of ISCA'25 (arXiv
2505.09343v2).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A figure with its source."""

    value: float
    source: str


@dataclass(frozen=True)
class Phases:
    """Seconds of one training step by phase, as ISCA table 4 gives them for the multi-plane network."""

    forward: float
    backward: float
    weights: float
    pair: float
    bubble: float
    optimizer: float
    step: float


@dataclass(frozen=True)
class Profile:
    """Seconds of one overlapped pair of chunks of four MoE layers, EP64, evenly loaded, as profiled."""

    span: float
    computation: float
    """In which at least one kernel computes."""
    communication: float
    """In which at least one kernel communicates, waiting included."""


PROFILE = Profile(span=0.1290, computation=0.1243, communication=0.1130)
"""deepseek-ai/profile-data at 4496024, train.json, by `pipeline.kernel_trace`."""

STEP = Phases(forward=1.13, backward=1.99, weights=0.48, pair=13.95, bubble=2.06, optimizer=0.29, step=19.926)


@dataclass(frozen=True)
class DecodeFigures:
    """The limit of decoding over one kind of link (ISCA §2.3.2)."""

    name: str
    bandwidth: float
    """Bytes a second of a GPU, one way."""
    microseconds: float
    """Of one micro-batch's dispatch and combine."""
    tpot: float
    """Milliseconds."""
    speed: float
    """Tokens a second of one request."""


CHECKPOINT = Published(671_026_419_200, "by its config.json and the routing biases of its files")
BIASES = Published(14_848, "58 x 256 in the files of its weights")
ACTIVE = Published(37e9, "V3 §2: 37B activated")
FLOPS_V3 = Published(250e9, "ISCA table 2")
FLOPS_V2 = Published(155e9, "ISCA table 2")
KV_V3 = Published(70_272, "ISCA table 1")
KV_QWEN = Published(327_680, "ISCA table 1")
KV_LLAMA = Published(516_096, "ISCA table 1")
KV_QWEN_TIMES = Published(4.66, "ISCA table 1")
KV_LLAMA_TIMES = Published(7.28, "ISCA table 1; by its own bytes 7.34")
TOKENS_A_STEP = Published(62_914_560, "V3 §4.2, §4.3: 15,360 x 4,096 = 1,920 x 32,768 = 480 x 131,072")
MFU_CAUSAL = Published(0.3894, "ISCA table 4")
MFU_FULL = Published(0.4373, "ISCA table 4")
TOKENS_A_DAY = Published(272.80e9, "ISCA table 4")
HOURS_A_TRILLION = Published(180e3, "V3 §1")
EXPERTS_A_NODE = Published(3.2, "V3 §3.2.2: experts a node at the cost of one, 160 over 50 GB/s")
EXPERTS_AT_NO_COST = Published(13, "V3 §3.2.2: the same in four nodes")
NOMINAL_PORT = Published(50e9, "V3 §3.2.2: bytes a second of InfiniBand")
DRAFT_SPEED = Published(1.8, "V3 §5.4.3: tokens a second with one draft, over those without")
DRAFT_ACCEPTANCE = (0.85, 0.9)
"""Of second tokens (V3 §5.4.3)."""
DECODE = (
    DecodeFigures("InfiniBand, 50 GB/s", 50e9, microseconds=120.96, tpot=14.76, speed=67.0),
    DecodeFigures("GB200 NVL72, 900 GB/s", 900e9, microseconds=6.72, tpot=0.82, speed=1200.0),
)
HOME_V2, HOME_DENSE, HOME_V3 = "about 20, or twice", "single digits", "about 20"
"""Tokens a second on computers at home (ISCA §2.2.2)."""

EPLB_LOAD = (
    (90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86),
    (20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27),
)
"""[layers, experts]: the example in the readme of deepseek-ai/EPLB, for 16 slots on 8 GPUs of two nodes."""
EPLB_SLOTS = (
    (5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1),
    (7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1),
)
"""[layers, slots]: the experts in them that it prints."""
