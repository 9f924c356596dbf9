"""The step, the loop over steps, and what surrounds them."""
