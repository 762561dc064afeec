"""Mailboxes: one-sided messages through a window, or two-sided messages between hosts, chosen by a trial."""
