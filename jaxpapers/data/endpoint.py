"""A chat-completions endpoint: OpenAI's, or any that speaks its protocol.

The client (extra ``language``) is imported when the first request is sent.
"""

import dataclasses
import functools
import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxpapers import extras

Messages = Sequence[Mapping[str, str]]
Schema = Mapping[str, Any]

# Worth another try: timeouts, conflicts, too many requests, faults of the server.
TRANSIENT = {408, 409, 425, 429}
MAX_WAIT = 60.0


class Reply(NamedTuple):
    """What a model answered.

    Attributes:
      text: of the first choice; "" where the model declined.
      prompt_tokens, completion_tokens: as the endpoint counts them; 0: not said.
      cut: whether the text ends at the limit of tokens.
      tries: requests that it took, failed ones included.
    """

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cut: bool = False
    tries: int = 1


class Unreachable(ConnectionError):
    """The endpoint gave no answer, after all retries."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A chat-completions endpoint: OpenAI's, vLLM, llama.cpp, Ollama, a proxy.

    Attributes:
      model: its name there.
      url: base URL.
      key: environment variable that holds the key, not the key; "": none is needed.
      temperature: None: the endpoint's default.
      max_tokens: of a reply.
      structured: whether it takes a JSON schema as ``response_format``. Where it refuses
        one, replies are asked for as a fenced block from then on.
      timeout: seconds of one request.
      retries: requests sent again after a transient failure.
      wait: seconds before the first of them; doubled each time, at most a minute.
    """

    model: str
    url: str = "https://api.openai.com/v1"
    key: str = "OPENAI_API_KEY"
    temperature: float | None = None
    max_tokens: int = 8192
    structured: bool = True
    timeout: float = 120.0
    retries: int = 4
    wait: float = 1.0

    def __post_init__(self):
        if not self.model:
            raise ValueError("chat.model is empty; expected the endpoint's model name")
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"chat.url must be http:// or https://, got {self.url!r}")
        for name, low in (("max_tokens", 1), ("retries", 0), ("wait", 0)):
            if not getattr(self, name) >= low:
                raise ValueError(
                    f"chat.{name} must be >= {low}, got {getattr(self, name)}"
                )
        if not self.timeout > 0:
            raise ValueError(f"chat.timeout must be > 0 seconds, got {self.timeout}")

    @property
    def identity(self) -> Mapping[str, Any]:
        """Model, URL and what is asked of it."""
        names = ("model", "url", "temperature", "max_tokens", "structured")
        return {name: getattr(self, name) for name in names}

    def __call__(self, messages: Messages, schema: Schema | None) -> Reply:
        """Sends a request, again after transient failures.

        Raises:
          Unreachable: no answer after all retries; names the URL and their number.
          ValueError: the endpoint refuses the request, or the key is not set.
          ModuleNotFoundError: the extra ``language`` is not installed.
        """
        with extras.named():
            import openai

        client, problem = self._client, ""
        failures = refused = 0
        while failures <= self.retries:
            if failures and problem:
                time.sleep(min(self.wait * 2.0 ** (failures - 1), MAX_WAIT))
            request = self._request(messages, schema)
            try:
                done = client.chat.completions.create(**request)
                return _reply(done)._replace(tries=failures + refused + 1)
            except openai.APIStatusError as e:
                status = e.status_code
                if status in TRANSIENT or status >= 500:
                    problem, failures = f"status {status}", failures + 1
                elif "response_format" in request and _is_about_format(e):
                    # No failure: the same request without a schema is still to be sent.
                    self.__dict__["_plain"], problem, refused = True, "", refused + 1
                else:
                    raise ValueError(self._refusal(status, e)) from None
            except openai.APIConnectionError as e:
                problem, failures = type(e).__name__, failures + 1
        raise Unreachable(
            f"{self.url} does not answer ({problem}) after {self.retries} retries; what "
            "was answered is in the cache, the same command continues"
        )

    _plain = False

    def _request(self, messages: Messages, schema: Schema | None) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": self.max_tokens,
        }
        if self.temperature is not None:
            request["temperature"] = self.temperature
        if schema and self.structured and not self._plain:
            named = {"name": "reply", "schema": schema, "strict": True}
            request["response_format"] = {"type": "json_schema", "json_schema": named}
        elif schema:
            request["messages"] = [
                *messages,
                {"role": "user", "content": fenced(schema)},
            ]
        return request

    @functools.cached_property
    def _secret(self) -> str:
        value = os.environ.get(self.key, "") if self.key else "none"
        if not value:
            raise ValueError(
                f"the environment variable {self.key} is not set: it holds the key of "
                f"{self.url}; an endpoint without keys has chat.key=''"
            )
        return value

    @functools.cached_property
    def _client(self) -> Any:
        import openai

        return openai.OpenAI(
            api_key=self._secret, base_url=self.url, timeout=self.timeout, max_retries=0
        )

    def _refusal(self, status: int, error: Exception) -> str:
        if status in (401, 403):  # Such replies quote parts of the key.
            return (
                f"{self.url} refuses the key in {self.key or 'no variable'} ({status})"
            )
        reason = " ".join(str(error).split()).replace(self._secret, "***")[:300]
        return f"{self.url} refuses the request: {reason}"


def fenced(schema: Schema) -> str:
    """The request for JSON, where the endpoint takes no schema."""
    return (
        "Reply with one ```json block and nothing else. Its value must follow this JSON "
        f"schema:\n{json.dumps(schema)}"
    )


def _is_about_format(error: Any) -> bool:
    text = str(error).lower()
    return error.status_code in (400, 422) and any(
        word in text for word in ("response_format", "json_schema", "schema")
    )


def _reply(done: Any) -> Reply:
    choice = done.choices[0] if done.choices else None
    usage = done.usage
    return Reply(
        (choice.message.content or "") if choice else "",
        usage.prompt_tokens if usage else 0,
        usage.completion_tokens if usage else 0,
        choice is not None and choice.finish_reason == "length",
    )
