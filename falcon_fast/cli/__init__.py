"""`falcon-fast`: a file a command, each a thin call into the package."""
