"""Training at the end: kept weights are distilled from the dense model, with masks fixed."""
