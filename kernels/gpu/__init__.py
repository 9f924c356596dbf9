"""The loss, the projector and the photometric stage in Triton, for NVIDIA GPUs from sm_80 on.

These modules are imported only when they are used, because all of them but `support` import triton.
"""
