"""The loaders. Each yields the views that the clock (`views/sampling.py`) names; they differ in how they decode and crop."""
