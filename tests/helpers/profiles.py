"""Profiles of models that are not here, with the real sizes of their layers."""

import random
from collections.abc import Mapping

from prunewright.state import COST_DELTAS, LayerProfile, ModelProfile

QWEN3_4B = {
    "self_attn.q_proj": 2560 * 4096,
    "self_attn.k_proj": 2560 * 1024,
    "self_attn.v_proj": 2560 * 1024,
    "self_attn.o_proj": 4096 * 2560,
    "mlp.gate_proj": 2560 * 9728,
    "mlp.up_proj": 2560 * 9728,
    "mlp.down_proj": 9728 * 2560,
}


def make_model(
    blocks: int,
    seed: int = 0,
    sizes: Mapping[str, int] = QWEN3_4B,
    domains: tuple[str, ...] = (),
) -> ModelProfile:
    """A profile whose signals and costs are spread as those of a real model half pruned.

    With domains each layer's cost is the mean of theirs, which are spread around it.
    """
    dice = random.Random(seed)
    total = blocks * sum(sizes.values())
    layers: list[LayerProfile] = []
    for block in range(blocks):
        for projection, parameters in sizes.items():
            # Per cent of perplexity for a per cent of the model's sparsity.
            rate = 2 * dice.lognormvariate(0, 0.6)
            costs = [
                rate * d * g * parameters / total
                for d, g in zip(COST_DELTAS, (1, 1.2, 1.4), strict=True)
            ]
            layers.append(
                LayerProfile(
                    name=f"model.layers.{block}.{projection}",
                    block=block,
                    projection=projection,
                    parameters=parameters,
                    sparsity=dice.uniform(0.3, 0.6),
                    loss_cost=(costs[0], costs[1], costs[2]),
                    signals={name: dice.gauss(0, 1) for name in ("z_s", "z_g", "z_c")},
                )
            )
    if domains:
        layers = [_by_domain(layer, domains, dice) for layer in layers]
    return ModelProfile(revision="r", gradient_revision="r", layers=layers)


def _by_domain(layer: LayerProfile, domains: tuple[str, ...], dice: random.Random) -> LayerProfile:
    parts = [dice.lognormvariate(0, 0.5) for _ in domains]
    factors = [len(parts) * part / sum(parts) for part in parts]
    costs, gains = (
        {
            name: tuple(factor * value for value in values)
            for name, factor in zip(domains, factors, strict=True)
        }
        for values in (layer.loss_cost, layer.regrow_gain)
    )
    return layer.model_copy(update={"domain_costs": costs, "domain_gains": gains})
