"""What asking each provider of LLMs takes. Nothing of LangChain is imported here."""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prunewright.state import InputError


@dataclass(frozen=True)
class Provider:
    """What asking a provider takes.

    Attributes:
        package: LangChain's, to import.
        install: what pip is given.
        keys: the variables in which the client looks for its key.
        defaults: for its client; `agent_options` win over them.
        binding: for the binding to the schema.
    """

    package: str
    install: str
    keys: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    binding: Mapping[str, Any] = field(default_factory=dict)


# No retries but ours: Google's client reads 0 as its own default, and 1 as "try once"; Ollama's
# has none.
PROVIDERS = {
    "google_genai": Provider(
        "langchain_google_genai",
        "langchain-google-genai",
        ("GOOGLE_API_KEY", "GEMINI_API_KEY"),
        {"max_retries": 1, "temperature": 0.5},
    ),
    "openai": Provider(
        "langchain_openai",
        "'prunewright[openai]'",
        ("OPENAI_API_KEY",),
        {"max_retries": 0},
        # Without it OpenAI takes the schema for a wish.
        {"strict": True},
    ),
    "anthropic": Provider(
        "langchain_anthropic",
        "'prunewright[anthropic]'",
        ("ANTHROPIC_API_KEY",),
        {"max_retries": 0},
    ),
    "ollama": Provider(
        "langchain_ollama",
        "'prunewright[ollama]'",
        # Its own context of a few thousand tokens would cut a prompt without a word, and its
        # answers have no end.
        defaults={"num_ctx": 16_384, "num_predict": 8_192},
    ),
}


def check_access(name: str, options: Mapping[str, Any] | None = None) -> str:
    """Refuse a ``provider:model`` whose package or key is missing, before anything costs time.

    A key is not asked for where ``base_url`` names a server: those of one's own rarely need one.

    Returns:
        What is unusual about the access, in words; "" if nothing is.

    Raises:
        InputError: with the pip command or the variable to set.
    """
    provider, _, model = name.partition(":")
    if not provider or not model:
        raise InputError(f"the agent {name!r} is not of the form provider:model")
    known = PROVIDERS.get(provider)
    if known is None:
        return ""
    if importlib.util.find_spec(known.package) is None:
        raise InputError(f"the agent {name} needs another package: pip install {known.install}")
    if not known.keys or any(os.environ.get(key) for key in known.keys):
        return ""
    if any(option.endswith("api_key") for option in options or {}):
        return ""
    variables = " or ".join(known.keys)
    if (options or {}).get("base_url"):
        return f"{variables} is not set: the server at base_url is sent a placeholder for the key"
    raise InputError(
        f"the agent {name} needs an API key: set the environment variable {variables}, name a "
        "server that needs none (--set agent_options.base_url=...), or choose an agent without "
        "an LLM (--agent greedy)"
    )
