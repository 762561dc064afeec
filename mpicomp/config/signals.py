"""Names of signals."""

from __future__ import annotations

import signal

from mpicomp.errors import ConfigError


def signal_number(name: str) -> signal.Signals:
    """Return the signal `name`, such as ``"USR1"`` or ``"SIGUSR1"``; raise ConfigError if it cannot be caught."""
    full = name.upper() if name.upper().startswith("SIG") else f"SIG{name.upper()}"
    known = {s.name for s in signal.Signals} - {"SIGKILL", "SIGSTOP"}
    if full not in known:
        raise ConfigError(f"run.stop_signal = {name!r} must be the name of a signal that can be caught, such as 'USR1'")
    return signal.Signals[full]
