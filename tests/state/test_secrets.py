"""Where a configuration may hold a key, and how one is named instead."""

import re
from typing import Any
from urllib.parse import quote

import pytest

from prunewright.state import InputError
from prunewright.state.loading import load_config, validate_config
from prunewright.state.secrets import redact, redact_all, resolve_references

SECRET = "q7Zk-w3xV9-hidden"

HELD: dict[str, tuple[dict[str, Any], str]] = {
    "a query": ({"base_url": f"https://gw.example/v1?key={SECRET}"}, "key in base_url"),
    "a query of another name": ({"base_url": f"https://gw.example/?id={SECRET}"}, "id in base_url"),
    "Azure's query": ({"base_url": "https://h.azure.example/api?code=abc"}, "code in base_url"),
    "a query without a scheme": (
        {"base_url": f"gw.example/v1?token={SECRET}"},
        "token in base_url",
    ),
    "an encoded query": ({"base_url": f"https://h/?api%5Fkey={SECRET}"}, "api_key in base_url"),
    "a fragment": ({"base_url": f"https://h/#access_token={SECRET}"}, "access_token in base_url"),
    "a password": ({"base_url": f"https://me:{SECRET}@h/"}, "the password in base_url"),
    "a user alone": ({"base_url": f"https://{SECRET}@h/"}, "the password in base_url"),
    "Gemini's endpoint": (
        {"base_url": {"api_endpoint": f"https://h/?key={SECRET}"}},
        "key in api_",
    ),
    "a proxy": ({"client_args": {"proxy": f"socks5://u:{SECRET}@h:1"}}, "the password in proxy"),
    "a header": ({"additional_headers": {"X-Auth": SECRET}}, "X-Auth"),
    "a header of another name": ({"default_headers": {"X-Gateway": SECRET}}, "value of X-Gateway"),
    "a bearer": ({"default_headers": {"Authorization": f"Bearer {SECRET}"}}, "Authorization"),
    "a bearer elsewhere": ({"default_headers": {"X-Who": "Bearer abc"}}, "value of X-Who"),
    "a header of the client": ({"client_kwargs": {"headers": {"X-Id": SECRET}}}, "value of X-Id"),
    "headers as pairs": ({"client_args": {"headers": [["X-Id", SECRET]]}}, "value of headers"),
    "headers of each call": ({"model_kwargs": {"extra_headers": {"Z": SECRET}}}, "value of Z"),
    "a cookie": ({"client_kwargs": {"cookies": {"session": SECRET}}}, "value of session"),
    "a query of the client": ({"default_query": {"code": SECRET}}, "code"),
    "Azure's key": ({"default_headers": {"Ocp-Apim-Subscription-Key": SECRET}}, "Subscription-Key"),
    "Azure's token": ({"azure_ad_token": SECRET}, "azure_ad_token"),
    "a user and a password": ({"client_kwargs": {"auth": ["me", SECRET]}}, "auth"),
    "credentials": ({"credentials": {"type": "user", "id": SECRET}}, "type"),
    "a key by its form": ({"note": "sk-proj-q7Zkw3xV9hidden0123"}, "value of note"),
    "a key in a path": ({"base_url": "https://h/hf_q7Zkw3xV9hidden0123/v1"}, "value of base_url"),
    "the environment's": ({"note": "the canary of the test"}, "value of note"),
}


@pytest.mark.parametrize("case", HELD)
def test_a_config_with_a_key_is_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "canary of the test")
    options, words = HELD[case]
    with pytest.raises(InputError, match="does not belong into a config") as caught:
        validate_config({"agent_options": options})
    said = str(caught.value)
    assert words in said
    assert "env:NAME" in said
    assert "hidden" not in said


@pytest.mark.parametrize(
    "options",
    [
        {"base_url": "https://me.openai.azure.example/openai?api-version=2024-10-21"},
        {"base_url": "http://127.0.0.1:8000/v1", "timeout": 30},
        {"default_headers": {"anthropic-beta": "prompt-caching-2024-07-31"}},
        {"default_headers": {"HTTP-Referer": "https://example.org", "X-Title": "Pruning, 2nd"}},
        {"additional_headers": {"X-Team": "compression research"}, "stop": ["a", "b"]},
        {"default_headers": {"Authorization": "env:MY_HEADER"}, "api_key": "env:MY_KEY"},
        {"client_kwargs": {"auth": ["env:USER_NAME", "env:USER_PASS"]}, "max_tokens": 4096},
        {"shares": {"code": 2.0, "general": 1.0}, "domains": ["code"]},
    ],
)
def test_what_is_no_key_is_taken(options: dict[str, Any]) -> None:
    assert validate_config({"agent_options": options}).agent_options == options


def test_a_reference_stands_for_a_variable_which_is_redacted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_HEADER", SECRET)
    assert redact(SECRET) == SECRET
    options = {"default_headers": {"X-Auth": "env:MY_HEADER"}, "n": [1, "env:MY_HEADER"]}
    found = resolve_references(options)
    assert found == {"default_headers": {"X-Auth": SECRET}, "n": [1, SECRET]}
    assert redact(f"it was {SECRET}") == "it was [redacted]"
    assert redact_all({"a": [f"<{SECRET}>", 1, None]}) == {"a": ["<[redacted]>", 1, None]}
    monkeypatch.delenv("MY_HEADER")
    with pytest.raises(InputError, match="the environment variable MY_HEADER, which is not set"):
        resolve_references(options)


@pytest.mark.parametrize("override", ["agent_options={api_key: q7Zk", "agent_options=[q7Zk"])
def test_a_line_that_is_no_yaml_is_not_quoted(override: str) -> None:
    with pytest.raises(InputError, match=r"not valid YAML, line 1, column \d+: ") as caught:
        load_config(overrides=[override])
    assert not re.search("q7Zk", str(caught.value))


@pytest.mark.parametrize("variable", ["OPENAI_API_KEY", "HF_TOKEN", "DB_PASSWORD", "my_secret"])
def test_redact(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "s3cr&t/with+signs"
    monkeypatch.setenv(variable, f" {secret}\n")
    text = f"a {secret} b ' {secret}\\n' c {quote(secret, safe='')} d"
    assert redact(text) == "a [redacted] b '[redacted]' c [redacted] d"
    monkeypatch.setenv(variable, "")
    assert redact("nothing to hide") == "nothing to hide"
