"""The loss, the projector and the photometric stage in Triton, for NVIDIA GPUs from sm_80 on.

Nothing here is imported before it is used: triton is, by every module but `support`.
"""
