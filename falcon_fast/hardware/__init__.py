"""The machine: which device a run uses, what it could reach, what a step costs in FLOP, its precision, and the host's memory."""
