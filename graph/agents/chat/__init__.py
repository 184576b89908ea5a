"""An LLM in the agent's seat: its provider, the way there and back, the reading of its answer."""
