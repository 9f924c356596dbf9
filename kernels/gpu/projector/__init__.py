"""The projector's BatchNorm, activation and products in Triton."""
