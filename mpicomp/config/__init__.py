"""The configuration of a run in one TOML file: sections, checks, and the objects built from them."""
