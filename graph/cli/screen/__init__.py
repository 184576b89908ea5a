"""What the terminal shows: the only place that knows rich."""
