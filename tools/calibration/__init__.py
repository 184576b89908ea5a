"""What calibration measures of each layer: activations, gradients, and costs from both."""
