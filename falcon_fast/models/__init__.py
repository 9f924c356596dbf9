"""Backbones by name, the network that is trained, and BatchNorm whose statistics are per view."""
