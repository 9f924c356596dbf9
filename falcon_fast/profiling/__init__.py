"""Where the time of a step goes: measured, explained, and predicted for a GPU that this machine does not have."""
