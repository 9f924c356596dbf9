"""Backbones by name, the network that is trained, and BatchNorm with statistics per view."""
