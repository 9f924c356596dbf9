"""The clock and what it decides: which image, which crop and which colours make each view, and how these are computed."""
