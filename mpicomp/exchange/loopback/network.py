"""The network of a simulation: when a message arrives.

Each rank has one port to the network, as a host has one network card. The port sends at `Links.bytes_per_s` and, at the
same time, receives at the same speed. What a rank sends to several targets at once shares its port and ends together;
what it sends later follows:

    begin  = max(now, the time at which the source's port is free to send)
    end    = begin + (bytes to all targets) / bytes_per_s

The target's port takes messages in while they are being sent, in the order in which their sending was asked for:

    received = max(end, max(begin, the time at which the target's port is free to receive) + bytes / bytes_per_s)
    arrival  = received + latency

So a rank that sends to four neighbors takes four times as long as one that sends to a single one, and a hub is as slow
for its workers as its own link. Between the ports the network has no limit. Packets are not modelled: a message arrives
whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Links:
    """The links of a simulated network, one for each rank.

    Attributes:
        latency_s: seconds from the end of sending to the arrival.
        bytes_per_s: the bandwidth in each direction.

    """

    latency_s: float = 0.0
    bytes_per_s: float = math.inf


class Network:
    """The ports of all ranks, and when they are free. Times are whole nanoseconds, so that sums are exact."""

    def __init__(self, size: int, links: Links) -> None:
        self._size = size
        self._links = links
        self._free_to_send_ns = [0] * size
        self._free_to_receive_ns = [0] * size

    def send(self, source: int, nbytes: Mapping[int, int], now_ns: int) -> dict[int, int]:
        """Send messages of so many bytes to several targets at once and return when each arrives."""
        begin_ns = max(now_ns, self._free_to_send_ns[source])
        end_ns = self._free_to_send_ns[source] = begin_ns + self._transmission_ns(sum(nbytes.values()))
        arrivals = {}
        for target, size in nbytes.items():
            free_ns = max(begin_ns, self._free_to_receive_ns[target]) + self._transmission_ns(size)
            self._free_to_receive_ns[target] = free_ns
            arrivals[target] = max(end_ns, free_ns) + round(1e9 * self._links.latency_s)
        return arrivals

    def all_reduce_ns(self, nbytes: int) -> int:
        """Return how long an all-reduce takes in which each rank sends `nbytes`, by 2 (size - 1) steps in a ring."""
        return self._transmission_ns(nbytes) + 2 * (self._size - 1) * round(1e9 * self._links.latency_s)

    def free_ns(self) -> int:
        """Return when all ports are free."""
        return max(*self._free_to_send_ns, *self._free_to_receive_ns)

    def _transmission_ns(self, nbytes: int) -> int:
        return round(1e9 * nbytes / self._links.bytes_per_s)
