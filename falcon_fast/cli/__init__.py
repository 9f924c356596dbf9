"""The command `falcon-fast`: one file for each of its commands, which parses, calls the package, and prints."""
