"""What a trained network is worth: frozen features, linear probe, kNN, clustering, the four collapse checks."""
