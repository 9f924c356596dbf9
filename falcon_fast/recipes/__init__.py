"""The recipes of the package: one TOML file each, with the settings that differ from the defaults in config/settings.py."""
