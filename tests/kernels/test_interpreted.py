"""The logic of the quantisers and the GEMM by Triton's CPU interpreter."""

from tests.kernels.interpreter import needs_interpreter, run_interpreted


@needs_interpreter
def test_kernels_agree_with_their_references() -> None:
    run_interpreted("interpreted.py")
