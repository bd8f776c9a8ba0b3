"""FP8 quantisation in float64 and numpy, built from the definition of E4M3 alone."""

import numpy as np


def code_values() -> np.ndarray:
    """The 256 values of E4M3 (bias 7, no infinities, 0x7F and 0xFF are NaN) from their bits."""
    code = np.arange(256)
    exponent, fraction = (code >> 3) & 15, (code & 7) / 8
    magnitude = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7))
    magnitude[(code & 0x7F) == 0x7F] = np.nan
    return np.where(code < 128, magnitude, -magnitude)


def nearest_code(value: np.ndarray) -> np.ndarray:
    """Codes nearest to finite float64 values of at most 448, ties to the even code."""
    magnitudes = code_values()[:127]
    above = np.searchsorted(magnitudes, np.abs(value))
    below = np.maximum(above - 1, 0)
    up, down = magnitudes[above] - np.abs(value), np.abs(value) - magnitudes[below]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return np.where(np.signbit(value), code + 128, code).astype(np.uint8)


def oracle_scale(amax: float, power_of_two: bool) -> float:
    if amax == 0:
        return 1.0
    if not power_of_two:
        return max(float(np.float32(amax / 448)), 2.0**-126)
    exponent = -126
    while 448 * 2.0**exponent < amax:  # exact in float64
        exponent += 1
    return 2.0**exponent


def oracle(x: np.ndarray, block: tuple[int, int], power_of_two: bool) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of a finite float64 matrix, block by block."""
    height, width = block
    scales = np.empty((-(-x.shape[0] // height), -(-x.shape[1] // width)))
    codes = np.empty(x.shape, dtype=np.uint8)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = (slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
            scales[i, j] = oracle_scale(np.abs(x[at]).max(), power_of_two)
            # The recipe rounds the inverse and the product to FP32 before it rounds to E4M3.
            product = (x[at] * float(np.float32(1 / scales[i, j]))).astype(np.float32).astype(np.float64)
            codes[at] = nearest_code(np.clip(product, -448, 448))
    return codes, scales


def spread(codes: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """The FP32 values, in float64, of E4M3 codes (uint8) with a scale for each block."""
    for axis in (0, 1):
        scales = np.repeat(scales, block[axis], axis=axis)
    scales = scales[: codes.shape[0], : codes.shape[1]]
    return (code_values()[codes] * scales).astype(np.float32).astype(np.float64)
