"""The machine: the device that a run uses, its peak rates, the FLOP of a step, the precision, and the host's memory."""
