"""What an LLM is told of a step: the templates, and the words and tables that fill them."""
