"""A small model that nodes of two ranks train together, or as many single ranks on the same samples."""

import torch
from torch import nn

import mpicomp
from mpicomp.algorithms import DGC, DPSGD, GMC, SSGD, AdaGossip, Choco, StreamingDiLoCo
from mpicomp.topology import ring, star

METHODS = {
    "dpsgd": DPSGD(),
    "choco": Choco(0.3),
    "choco_overlap": Choco(0.3, overlap=True),
    "adagossip": AdaGossip(0.05),
    "dgc_norm": DGC(clip="norm", clip_norm=0.1),
    "dgc_rms": DGC(clip="rms"),
    "gmc": GMC(momentum=0.9),
    "gmc_plus": GMC(momentum=0.9, detachment=0.3),
    "ssgd": SSGD(),
    "streaming_diloco": StreamingDiLoCo(2, fragments=1),
}
STEPS = 6
_BATCH = 8


def train_nodes(world, algorithm, groups=None, compressor=None):
    """Return the parameters of this rank, and the bytes that it has sent.

    With `groups`, nodes of two ranks, each rank has one half of the batch of its node; without, a rank has all of it.
    """
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    generator = torch.Generator().manual_seed(0)  # of this thread
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) / 4
    momentum = 0.0 if isinstance(algorithm, GMC | DGC) else 0.9
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum, weight_decay=1e-3)
    topology = star if isinstance(algorithm, GMC | DGC) else ring
    gossip = mpicomp.distribute(model, optimizer, algorithm, topology, compressor, world, groups=groups)
    number, part = world.rank, slice(0, _BATCH)
    if gossip.node is not None:
        number, half = gossip.node.number, _BATCH // 2
        part = slice(half * gossip.node.place, half * (gossip.node.place + 1))
    for step in range(STEPS):
        samples = torch.Generator().manual_seed(97 * step + number)
        inputs = torch.randn(_BATCH, 6, generator=samples, dtype=torch.float64)[part]
        targets = torch.randn(_BATCH, 3, generator=samples, dtype=torch.float64)[part]
        gossip.step(lambda x=inputs, y=targets: nn.functional.mse_loss(model(x), y))
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]), gossip.bytes_sent
