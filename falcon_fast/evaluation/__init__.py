"""Evaluate a trained network: frozen features, linear probe, kNN, clustering, and the four collapse checks."""
