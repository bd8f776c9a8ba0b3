"""Links of an H800 node, for tests of the network parts (report §3.2.2: 160 and 50 GB/s)."""

from dataclasses import replace

from infra.cluster.machines import MACHINES, Machine

NVLINK, NETWORK = 160e9, 50e9
NOMINAL = replace(MACHINES["h800"], network=NETWORK)


def nodes_of(gpus: int) -> Machine:
    """The same links with other nodes."""
    return replace(NOMINAL, gpus_per_node=gpus)
