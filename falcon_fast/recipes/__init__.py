"""The runs that ship, as data: one TOML file each, naming what differs from the defaults in config.py."""
