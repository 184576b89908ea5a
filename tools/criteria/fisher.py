"""Optimal Brain Damage with a Kronecker-factored Fisher diagonal.

The saliency of a weight is 1/2 * w_ij^2 * F_ij with F_ij = E[x_j^2] * D_i: x the layer's inputs,
D_i the mean square of the gradient of the summed token losses at output i, damped. It estimates
the rise of the mean token loss, in nats, when the weight is set to zero (LeCun et al. 1989; the
factored Fisher as in K-FAC, Martens and Grosse 2015). Compared inside a row it orders the
weights as Wanda does; across rows it differs.

Damping: an output whose gradient vanishes is not one that may go. Queries of a head that always
attends to the first token have gradients near zero, since its softmax is saturated, and pruning
them away multiplied the perplexity of SmolLM2 by seven. So each row's factor is averaged with
the layer's mean, which leaves the layer's sum as it is.
"""

from torch import Tensor

from prunewright.tools.masks import Group

GROUP: Group = "layer"

DAMPING = 1.0
"""Weight of the layer's mean against a row's own factor."""


def score(weight: Tensor, input_square: Tensor, gradient_square: Tensor) -> Tensor:
    """1/2 * w_ij^2 * E[x_j^2] * D_i with D_i = (E[d_i^2] + DAMPING * mean E[d^2]) / (1 + DAMPING).

    Args:
        weight: [outputs, inputs].
        input_square: E[x_j^2], [inputs].
        gradient_square: E[d_i^2], [outputs].

    Returns:
        Predicted loss increase of each weight, nats, float32 [outputs, inputs].
    """
    return saliency(weight, input_square, damped(gradient_square).unsqueeze(1))


def saliency(weight: Tensor, input_square: Tensor, factors: Tensor) -> Tensor:
    """1/2 * w_ij^2 * E[x_j^2] * D_i for given factors D, float32.

    Args:
        weight: of any shape.
        input_square: the E[x_j^2] that belong to it, of a shape that is broadcast to its.
        factors: the D_i, likewise.
    """
    product = weight.float().square()
    product *= input_square.float()
    product *= factors.float() * 0.5
    return product


def damped(gradient_square: Tensor) -> Tensor:
    """Each row's factor averaged with the layer's mean [outputs], float32."""
    factors = gradient_square.float()
    return (factors + DAMPING * factors.mean()) / (1 + DAMPING)
