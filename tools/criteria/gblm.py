"""GBLM-Pruner (arXiv 2311.04902): Wanda's score plus weight times gradient, inside each row."""

import math

import torch
from torch import Tensor

from prunewright.tools.masks import Group

GROUP: Group = "row"
SCALE = 100.0
"""Weight of the gradient's part against Wanda's: the paper's alpha."""
SAMPLES, TOKENS = 128, 2048
"""Calibration of the paper, whose balance of the two parts is kept: it took sums, not means."""


def score(weight: Tensor, input_square: Tensor, weight_gradient_square: Tensor) -> Tensor:
    """|W_ij| * ||X_j||_2 + SCALE * |W_ij| * ||G_ij||_2.

    ||X_j||_2 is the norm over a sample's tokens, ||G_ij||_2 that over the samples of the gradient
    of the mean token loss, both as they would be with `SAMPLES` samples of `TOKENS` tokens.

    Args:
        weight: [outputs, inputs].
        input_square: mean of x_j^2 over the calibration tokens [inputs].
        weight_gradient_square: mean over samples of (dL/dW_ij)^2 [outputs, inputs].

    Returns:
        float32 [outputs, inputs].
    """
    gradients = weight_gradient_square.to(weight.device, torch.float32)
    factors = (gradients * SAMPLES).sqrt_().mul_(SCALE)
    factors += input_square.float().sqrt() * math.sqrt(TOKENS)
    return factors.mul_(weight.float().abs())
