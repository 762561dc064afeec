"""A table in the place of the driver of GPUs: what CUDA shows of it under a mask."""

from pathlib import Path
from types import SimpleNamespace

from mpicomp.exchange.placement import Driver

FREE = 80 * 2**30


def node(count=4, name="a", capability=(9, 0)):
    """Return torch's properties of the GPUs of a machine, by number."""
    major, minor = capability
    return [SimpleNamespace(name="H100", major=major, minor=minor, uuid=f"{name}{i}") for i in range(count)]


class Table(Driver):
    """The GPUs of a machine under CUDA_VISIBLE_DEVICES, as the CUDA C++ Programming Guide has it.

    Entries are numbers, or UUIDs, of which the first characters do; the first that does not exist hides all behind it.

    Args:
        physical: the GPUs that the process may use, e.g. those of a Slurm step.
        mask: CUDA_VISIBLE_DEVICES; None if it is not set.
        environ: other variables.
        free: bytes that are free, by UUID.
        broken: what starting a GPU raises, by UUID.
        mig: the GPU around each MIG instance. CUDA shows the first instance only, here by the UUID of the whole GPU.
        compiled: what torch was compiled for.
        has_cuda: whether it was compiled for CUDA at all.

    """

    root = Path("/nowhere")

    def __init__(
        self, physical, mask=None, *, environ=(), free=(), broken=(), mig=(), compiled=("sm_80", "sm_90"), has_cuda=True
    ):
        self.environ = dict(environ) | ({} if mask is None else {"CUDA_VISIBLE_DEVICES": mask})
        self.physical, self.free, self.broken, self.mig = physical, dict(free), dict(broken), dict(mig)
        self.compiled, self.cuda = list(compiled), has_cuda
        self.started = []

    def has_cuda(self):
        return self.cuda

    def properties(self):
        if "CUDA_VISIBLE_DEVICES" not in self.environ:
            return self.physical
        shown = []
        for entry in self.environ["CUDA_VISIBLE_DEVICES"].split(","):
            if entry in self.mig:
                return [gpu for gpu in self.physical if gpu.uuid == self.mig[entry]]
            found = [
                gpu
                for number, gpu in enumerate(self.physical)
                if entry == str(number) or (entry.startswith("GPU-") and f"GPU-{gpu.uuid}".startswith(entry))
            ]
            if len(found) != 1:
                break
            shown += found
        return shown

    def architectures(self):
        return self.compiled

    def start(self, gpu):
        if gpu.uuid in self.broken:
            raise self.broken[gpu.uuid]
        self.started.append(gpu.uuid)
        return self.free.get(gpu.uuid, FREE), FREE
