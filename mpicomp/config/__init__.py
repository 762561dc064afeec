"""A run as one TOML file: its sections, their checks, and what they build."""
