"""N ranks as N threads of one process: for tests, the debugger, a laptop, and the study of many ranks.

Messages are packed into bytes exactly as for MPI, so that layouts, byte counts and results are the same. A message is
packed once and read in place by all receivers.

At most as many ranks run at a time as there are cores. Ranks take turns only when they wait for each other through this
package, so they must not wait by other means. When all remaining ranks wait for each other, or for one that has
returned, the run fails instead of hanging.
"""

from mpicomp.exchange.loopback.mailbox import Delays
from mpicomp.exchange.loopback.network import Links
from mpicomp.exchange.loopback.world import LoopbackWorld, run

__all__ = ["Delays", "Links", "LoopbackWorld", "run"]
