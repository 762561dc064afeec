"""Asynchronous training through hubs: workers send gradients, hubs apply them as they come and answer with the model.

    worker m:   g = grad F_m(w_m);  p = g + e_m;  q = C(p);  e_m = p - q;  send q to the hub
                wait for the answer:  w_m = w, or w_m = w_m + a
    hub:        on a message q of worker m:  w = w - lr u(q), where q may be corrected by w - b_m
                send w;  b_m = w                           or, compressed: a = C_down(w - b_m);  send a;  b_m = b_m + a

w is the model of the hub and w_m that of worker m; b_m the copy of w_m that the hub keeps; F_m the loss of the batch of
worker m and e_m its error memory, none if C leaves nothing out, or amplifies, as unbiased compressors do; C and C_down
are the compressors of both directions; lr is the learning rate and u() the direction that the optimizer makes of a
gradient, both of the hub.

The first ranks are the hubs, each with an even part of the flat model, and compute no gradients; the others are the
workers, which talk to every hub. At the next message of worker m the gradient was computed at ``b_m``; errors of a
compressed answer stay in ``w - b_m``, so they are sent later. Without a compressor a worker holds exactly the model of
the hub.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from mpicomp.algorithms.asynchronous.base import (
    DELAYS,
    AsynchronousAlgorithm,
    Attempt,
    DelayCompensation,
    Share,
    count_delay_,
    part_of,
    require_connected,
)
from mpicomp.algorithms.base import Local, require_bounded_errors
from mpicomp.compression.base import Compressor
from mpicomp.compression.identity import Identity
from mpicomp.compression.message import Spec
from mpicomp.compression.wrap.feedback import ErrorFeedback
from mpicomp.errors import ConfigError, TopologyError
from mpicomp.exchange.base import Mail, Mailbox
from mpicomp.state import SCRATCH, State
from mpicomp.topology.base import Schedule

_OF_WHOLE_TENSORS = (torch.optim.Muon, torch.optim.Adafactor)
"""Optimizers whose step of an entry depends on the gradients of other entries of its tensor."""


@dataclass
class HubState:
    """What a hub of m parameters keeps.

    Attributes:
        backups: (m,) for each worker: its model.
        mean_square: (m,) of the gradients of all workers, or (workers, m) of those of each, for methods that need it.
        compressors: of the answers to each worker.
        updates: how many gradients have been applied.
        answered: for each worker, how many had been applied when it was answered.
        delays: (workers, DELAYS) int64, how often a gradient was how many updates late.
        scratch: (m,) room for a difference.
        correction: of the last gradient, the length of the correction over that of the gradient; a scalar.
        waiting: gradients that have been received and not yet applied, in that order; none between two checkpoints.

    """

    backups: list[Tensor]
    mean_square: Tensor | None
    compressors: list[State]
    updates: int
    answered: list[int]
    delays: Tensor
    scratch: Tensor = field(metadata=SCRATCH)
    correction: Tensor | None = field(default=None, metadata=SCRATCH)
    waiting: list[tuple[int, Mail]] = field(default_factory=list, metadata=SCRATCH)


@dataclass
class WorkerState:
    """What a worker keeps.

    Attributes:
        compressors: of the gradients to each hub; they hold the error memory.
        gradients: how many it has sent.
        is_answered: for each hub, whether its part of the model has come.

    """

    compressors: list[State]
    gradients: int
    is_answered: list[bool]


@dataclass(frozen=True)
class HubAlgorithm(AsynchronousAlgorithm[HubState | WorkerState]):
    """A method in which hubs hold the model; workers take it up from them ahead of each gradient.

    Attributes:
        compressor: of the gradients; one that leaves something out, and does not amplify, gets an error memory.
        downlink: of the answers; a lossless one sends the model itself.
        hubs: how many ranks hold the model, the first ones.
        share: who computes how many gradients.

    """

    moves_model_for_gradient: ClassVar[bool] = True

    compressor: Compressor = Identity()
    downlink: Compressor = Identity()
    hubs: int = 1
    share: Share = "by_speed"

    def __post_init__(self) -> None:
        if self.hubs < 1:
            raise ConfigError(f"algorithm.hubs = {self.hubs} must be at least 1")
        require_bounded_errors("a hub", self.downlink, "downlink")

    @property
    def compensation(self) -> DelayCompensation | None:
        """How a hub corrects a gradient for what its model has moved by since; None if it does not."""
        return None

    def check(self, schedule: Schedule) -> None:
        """Raise TopologyError unless there is an edge between every hub and every worker."""
        topology = require_connected(self.name, schedule)
        hubs, workers = range(self.hubs), range(self.hubs, topology.size)
        if not workers:
            raise TopologyError(
                f"{topology.size} ranks with algorithm.hubs = {self.hubs}: there must be a worker beside the hubs, "
                f"so start at least {self.hubs + 1} ranks"
            )
        for worker in workers:
            if missing := set(hubs) - (set(topology.sources(worker)) & set(topology.targets(worker))):
                remedy = "'star'" if self.hubs == 1 else f"'complete_bipartite' with topology.hubs = {self.hubs}"
                raise TopologyError(
                    f"topology.kind = {topology.name!r}: {self.name} needs an edge between hub {min(missing)} and "
                    f"worker {worker}. Use topology.kind = {remedy}."
                )

    def owners(self, size: int, spec: Spec) -> list[tuple[int, slice]]:
        """Return for each hub its even part of the flat model."""
        cuts = [spec.numel * hub // self.hubs for hub in range(self.hubs + 1)]
        return [(hub, slice(cuts[hub], cuts[hub + 1])) for hub in range(self.hubs)]

    @property
    def compressors(self) -> tuple[Compressor, ...]:
        """That of the gradients, with its error memory, and that of the answers."""
        return self._uplink, self.downlink

    def init(self, local: Local, mailbox: Mailbox) -> HubState | WorkerState:
        """Return on a hub copies of its model for all workers, which begin with it; on a worker, that it may begin.

        Raises:
            ConfigError: several hubs, and an optimizer whose step of an entry depends on others of the same tensor.

        """
        whole = [kind.__name__ for kind in local.optimizer_classes if issubclass(kind, _OF_WHOLE_TENSORS)]
        if whole and self.hubs > 1:
            raise ConfigError(
                f"algorithm.hubs = {self.hubs}: {whole[0]} needs the whole gradient of a tensor, of which each hub has "
                "a part. Use algorithm.hubs = 1, or an optimizer such as SGD or AdamW"
            )
        device = local.x.device
        if mailbox.rank >= self.hubs:
            parts = [part_of(local.spec, part) for _, part in self.owners(mailbox.size, local.spec)]
            compressors = [self._uplink.init(part, device, mailbox.rank) for part in parts]
            return WorkerState(compressors, 0, [True] * self.hubs)
        part = self.owners(mailbox.size, local.spec)[mailbox.rank][1]
        model = local.x[part]
        workers = mailbox.size - self.hubs
        return HubState(
            backups=[model.clone() for _ in range(workers)],
            mean_square=self._mean_square(model, workers),
            compressors=[self.downlink.init(part_of(local.spec, part), device, worker) for worker in range(workers)],
            updates=0,
            answered=[0] * workers,
            delays=torch.zeros((workers, DELAYS), dtype=torch.int64),
            scratch=torch.empty_like(model),
        )

    def phases(self, local: Local, state: HubState | WorkerState, mailbox: Mailbox) -> Attempt:
        """Compute and send a gradient, if the model has come from all hubs, and they have room for it."""
        assert isinstance(state, WorkerState), "a hub computes no gradient"
        if not all(state.is_answered):
            self.serve(local, state, mailbox)
        if not all(state.is_answered) or not all(mailbox.room(hub) for hub in range(self.hubs)):
            return False
        yield None
        for hub, part in self.owners(mailbox.size, local.spec):
            spec = part_of(local.spec, part)
            payload = self._uplink.compress(local.g[part], spec, state.compressors[hub])
            mailbox.put(payload, self._uplink.layout(spec), [hub], state.gradients)
            state.is_answered[hub] = False
        state.gradients += 1
        return True

    def awaited(self, state: HubState | WorkerState, mailbox: Mailbox) -> list[int]:
        """Return the hubs that have not answered, or have no room."""
        assert isinstance(state, WorkerState), "a hub computes no gradient"
        return [hub for hub, is_answered in enumerate(state.is_answered) if not (is_answered and mailbox.room(hub))]

    def serve(self, local: Local, state: HubState | WorkerState, mailbox: Mailbox) -> bool:
        """Apply and answer one gradient on a hub, take in answers on a worker."""
        if isinstance(state, WorkerState):
            return self._take_answers(local, state, mailbox)
        part = self.owners(mailbox.size, local.spec)[mailbox.rank][1]
        spec = part_of(local.spec, part)
        for source, mails in mailbox.receive(self._uplink.layout(spec)).items():
            state.waiting.extend((source, mail) for mail in mails)
        first = next((i for i, (source, _) in enumerate(state.waiting) if mailbox.room(source)), None)
        if first is None:
            return False
        source, mail = state.waiting.pop(first)
        worker = source - self.hubs
        model, gradient, backup = local.x[part], local.g[part], state.backups[worker]
        count_delay_(state.delays[worker], state.updates - state.answered[worker])
        gradient.zero_()
        self._uplink.accumulate(mail.payload, spec, gradient)
        torch.sub(model, backup, out=state.scratch)  # w - b_m: what the model has moved by since
        if self.compensation is not None:
            square = state.mean_square
            of_worker = square[worker] if square is not None and square.ndim == 2 else square
            state.correction = self.compensation.correct_(gradient, state.scratch, of_worker)
        local.update(part)
        state.updates += 1
        state.answered[worker] = state.updates
        if self.downlink.is_lossless:
            answer = self.downlink.compress(model, spec, state.compressors[worker])
            backup.copy_(model)
        else:
            answer = self.downlink.compress_difference_(model, backup, spec, state.compressors[worker], state.scratch)
        mailbox.put(answer, self.downlink.layout(spec), [source], state.updates)
        return True

    def updates(self, state: HubState | WorkerState) -> int:
        """Return how many gradients a hub has applied; 0 on a worker, which applies none."""
        return state.updates if isinstance(state, HubState) else 0

    def delays(self, state: HubState | WorkerState, mailbox: Mailbox) -> dict[int, list[int]]:
        """Return on a hub, by worker, how many gradients were how many updates late."""
        if isinstance(state, WorkerState):
            return {}
        return {self.hubs + worker: row for worker, row in enumerate(state.delays.tolist())}

    def diagnostics(self, local: Local, state: HubState | WorkerState) -> dict[str, float]:
        """Return on a hub that corrects ``correction``: of the last gradient, its length over that of the gradient."""
        if isinstance(state, WorkerState) or state.correction is None:
            return {}
        return {"correction": float(state.correction)}

    def _mean_square(self, model: Tensor, workers: int) -> Tensor | None:
        """Return what a hub keeps of squares of gradients at the start."""
        return None if self.compensation is None else self.compensation.init(model)

    def _take_answers(self, local: Local, state: WorkerState, mailbox: Mailbox) -> bool:
        owners = dict(self.owners(mailbox.size, local.spec))
        layouts = {hub: self.downlink.layout(part_of(local.spec, part)) for hub, part in owners.items()}
        arrived = mailbox.receive(layouts)
        for hub, mails in arrived.items():
            (mail,) = mails
            model = local.x[owners[hub]]
            if self.downlink.is_lossless:
                model.zero_()
            self.downlink.accumulate(mail.payload, part_of(local.spec, owners[hub]), model)
            state.is_answered[hub] = True
        return bool(arrived)

    @property
    def _uplink(self) -> Compressor:
        inner = self.compressor
        is_used_as_it_is = inner.is_lossless or inner.remembers_errors or inner.amplifies
        return inner if is_used_as_it_is else ErrorFeedback(inner)
