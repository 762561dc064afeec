"""The network of a simulation: when a message arrives.

Each node, of one rank or of several, has one port to the network, as a host has one network card. The port sends at
its bandwidth and, at the same time, receives at the same speed. What a rank sends to several targets at once shares the
port and ends together; what is sent later follows:

    begin  = max(now, the time at which the source's port is free to send)
    end    = begin + (bytes to all targets) / (bandwidth of the source)

The target's port takes messages in while they are being sent. What arrives in one busy period of a port, in which it is
never idle, takes as long as all its bytes do:

    received = max(end, begin of the busy period + (bytes in it so far) / (bandwidth of the target))
    arrival  = received + latency

So a rank that sends to four neighbors takes four times as long as one that sends to a single one, and a hub is as slow
for its workers as its own link. Between the ports the network has no limit. Packets are not modelled: a message arrives
whole. An all-reduce in a ring of ranks on M nodes goes through each port once, since the ranks of a node follow one
another, and is as fast as the slowest port:

    seconds = (bytes that a rank sends) / (bandwidth of the slowest port) + 2 (M - 1) latency;  0 on one node
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpicomp.errors import ConfigError


@dataclass(frozen=True)
class Links:
    """The links of a simulated network, one for each node.

    Attributes:
        latency_s: seconds from the end of sending to the arrival.
        bytes_per_s: the bandwidth in each direction.
        node_size: how many consecutive ranks share a port. Messages between them take no time.
        bytes_per_s_of_nodes: the bandwidth of each node, where they differ; `bytes_per_s` is then not used.

    """

    latency_s: float = 0.0
    bytes_per_s: float = math.inf
    node_size: int = 1
    bytes_per_s_of_nodes: tuple[float, ...] = ()


class Network:
    """The ports of all nodes, and when they are free. Times are whole nanoseconds, so that sums are exact."""

    def __init__(self, size: int, links: Links) -> None:
        self.links = links
        ports = -(-size // links.node_size)
        self._bytes_per_s = links.bytes_per_s_of_nodes or (links.bytes_per_s,) * ports
        if len(self._bytes_per_s) != ports:
            raise ConfigError(
                f"simulation.bytes_per_s has {len(self._bytes_per_s)} entries for {ports} nodes: give one for each, or "
                "one number for all"
            )
        self._free_to_send_ns = [0] * ports
        self._busy = [(0, 0)] * ports  # with receiving: since when, and for how long

    def send(self, source: int, nbytes: Mapping[int, int], now_ns: int) -> dict[int, int]:
        """Send messages of so many bytes to several targets at once and return when each arrives."""
        port = source // self.links.node_size
        outside = {target: size for target, size in nbytes.items() if target // self.links.node_size != port}
        begin_ns = max(now_ns, self._free_to_send_ns[port])
        end_ns = begin_ns + self._transmission_ns(sum(outside.values()), port)
        if outside:
            self._free_to_send_ns[port] = end_ns
        arrivals = dict.fromkeys(nbytes, now_ns)
        for target, size in outside.items():
            theirs = target // self.links.node_size
            since_ns, lasts_ns = self._busy[theirs]
            if begin_ns >= since_ns + lasts_ns:  # the port is idle by then
                since_ns, lasts_ns = begin_ns, 0
            since_ns, lasts_ns = min(since_ns, begin_ns), lasts_ns + self._transmission_ns(size, theirs)
            self._busy[theirs] = since_ns, lasts_ns
            arrivals[target] = max(end_ns, since_ns + lasts_ns) + round(1e9 * self.links.latency_s)
        return arrivals

    def all_reduce_ns(self, nbytes: int, ranks: Sequence[int]) -> int:
        """Return how long an all-reduce in a ring of `ranks` takes, in which each of them sends `nbytes`."""
        ports = {rank // self.links.node_size for rank in ranks}
        if len(ports) == 1:
            return 0
        slowest = min(ports, key=lambda port: self._bytes_per_s[port])
        return self._transmission_ns(nbytes, slowest) + 2 * (len(ports) - 1) * round(1e9 * self.links.latency_s)

    def free_ns(self) -> int:
        """Return when all ports are free."""
        return max(*self._free_to_send_ns, *(since_ns + lasts_ns for since_ns, lasts_ns in self._busy))

    def _transmission_ns(self, nbytes: int, port: int) -> int:
        return round(1e9 * nbytes / self._bytes_per_s[port])
