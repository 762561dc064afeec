"""One-sided messages: slots in a window or messages between hosts, chosen by a trial."""
