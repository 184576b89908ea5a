"""Optimal Brain Damage with a Kronecker-factored Fisher diagonal.

The saliency of a weight is 1/2 * w_ij^2 * F_ij with F_ij = E[x_j^2] * E[d_i^2]: x the layer's
inputs, d the gradient of the summed token losses at its outputs, both over calibration tokens.
It estimates the rise of the mean token loss, in nats, when the weight is set to zero (LeCun et
al. 1989; the factored Fisher as in K-FAC, Martens and Grosse 2015). Compared inside a row it
orders the weights as Wanda does; across rows it differs.
"""

from torch import Tensor

from prunewright.tools.masks import Group

GROUP: Group = "layer"


def score(weight: Tensor, input_square: Tensor, gradient_square: Tensor) -> Tensor:
    """1/2 * w_ij^2 * E[x_j^2] * E[d_i^2].

    Args:
        weight: [outputs, inputs].
        input_square: E[x_j^2], [inputs].
        gradient_square: E[d_i^2], [outputs].

    Returns:
        Predicted loss increase of each weight, nats, float32 [outputs, inputs].
    """
    saliency = weight.float().square()
    saliency *= input_square.float()
    saliency *= gradient_square.float().unsqueeze(1) * 0.5
    return saliency
