"""The plan of the Triton kernels."""

from __future__ import annotations

from falcon_fast.kernels.gpu.loss import plan


def test_every_processor_has_work() -> None:
    """Few images leave few blocks to the product, a range of a streaming sweep few strips to the columns."""
    few = plan.dense_plan(64, 2048, 16384, True, None, (9, 0), 132)
    assert few.splits * -(-128 // few.product.rows) * (2048 // few.product.features) == 128
    streaming = plan.dense_plan(1024, 2048, 65536, False, None, (9, 0), 132)
    assert 2 * 132 <= 2 * streaming.width // streaming.strip < 4 * 132
