"""The sections of a configuration: their fixed keys, and what is built from them.

A key such as ``kind`` names an entry of a registry; the other keys of the section are the parameters of that entry.
"""

from mpicomp.config.sections.base import Section, Values, shown
from mpicomp.config.sections.data import DataSection, ModelSection
from mpicomp.config.sections.method import (
    AlgorithmSection,
    CompressionSection,
    CompressorSection,
    DownlinkSection,
    TopologySection,
)
from mpicomp.config.sections.optimizer import OPTIMIZERS, OptimizerSection, ScheduleSection
from mpicomp.config.sections.run import CheckpointSection, RunSection, TrainingSection
from mpicomp.config.sections.simulation import SimulationSection, SlowSection

SECTIONS: dict[str, type[Section]] = {
    section.section: section
    for section in (
        RunSection,
        DataSection,
        ModelSection,
        TopologySection,
        CompressionSection,
        DownlinkSection,
        AlgorithmSection,
        OptimizerSection,
        ScheduleSection,
        TrainingSection,
        CheckpointSection,
        SlowSection,
        SimulationSection,
    )
}
"""The sections of a file, by name, in its order."""

__all__ = [
    "OPTIMIZERS",
    "SECTIONS",
    "AlgorithmSection",
    "CheckpointSection",
    "CompressionSection",
    "CompressorSection",
    "DataSection",
    "DownlinkSection",
    "ModelSection",
    "OptimizerSection",
    "RunSection",
    "ScheduleSection",
    "Section",
    "SimulationSection",
    "SlowSection",
    "TopologySection",
    "TrainingSection",
    "Values",
    "shown",
]
