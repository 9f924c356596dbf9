"""`falcon-fast plan`."""

from __future__ import annotations


def test_plan_explains_the_loss_on_a_gpu_that_need_not_be_there(falcon_fast):
    code, out, _ = falcon_fast(
        "plan", "--gpu", "h200", "--batch-size", 1024, "--num-codes", 524288, "--memory-budget", 512
    )
    assert code == 0 and "chosen: streaming" in out and "524,288 rademacher codes on H200" in out
    assert "starts frozen" in falcon_fast("plan", "--embedding-dim", 128)[1]
    code, _, error = falcon_fast("plan", "--gpu", "h100x")
    assert code == 2 and "did you mean 'h100'" in error
    assert falcon_fast("plan", "--memory-budget", 0)[0] == 2
