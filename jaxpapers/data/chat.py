"""Language models behind an OpenAI-compatible endpoint: cached, checked, counted.

    ask = chat.Chat(chat.Endpoint(model="qwen3", url="http://localhost:8000/v1", key=""),
                    cache="replies")
    value = ask.structured(messages, schema, check)

Every reply is kept in a file of the cache under a hash of all that it depends on, so a
run that was stopped goes on where it was and costs nothing twice. With ``recorded=True``
nothing is sent: tests and readers without a key repeat a run from its cache. A provider
is any function of that form: a local model, or a wrapper of another library.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from jaxpapers.data import replies
from jaxpapers.data.endpoint import Endpoint, Messages, Reply, Schema, Unreachable

__all__ = [
    "BadReply", "Chat", "Endpoint", "Messages", "Provider", "Reply", "Schema",
    "Unreachable", "Usage", "every",
]  # fmt: skip

T = TypeVar("T")
R = TypeVar("R")

# Of English text; an estimate before anything is sent.
CHARACTERS_PER_TOKEN = 4


@runtime_checkable
class Provider(Protocol):
    """A model. ``identity``: plain data, all that a reply depends on but the messages."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Part of the cache's key; no secrets."""
        ...

    def __call__(self, messages: Messages, schema: Schema | None) -> Reply:
        """The reply to messages, JSON of a schema where one is given."""
        ...


class BadReply(ValueError):
    """No reply that passes its checks, after all repairs."""


class Usage(NamedTuple):
    """Counts of a run.

    Attributes:
      requests: replies that were wanted.
      cached: of these, found in the cache.
      repairs: of these, asked for since the reply before did not pass its checks.
      failed: values that were given up.
      retries: requests that were sent again.
      prompt_tokens, completion_tokens: of replies that were not cached.
    """

    requests: int = 0
    cached: int = 0
    repairs: int = 0
    failed: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def cost(self, price: tuple[float, float]) -> float:
        """Cost at a price per million prompt tokens and completion tokens."""
        return (self.prompt_tokens * price[0] + self.completion_tokens * price[1]) / 1e6

    def text(self, price: tuple[float, float] = (0.0, 0.0)) -> str:
        """One line; the cost where there is a price."""
        line = (
            f"{self.requests:,} requests, {self.cached:,} cached, {self.repairs:,} "
            f"repairs, {self.retries:,} retries, {self.failed:,} failed; "
            f"{self.prompt_tokens:,} + {self.completion_tokens:,} tokens"
        )
        return f"{line}, cost {self.cost(price):.4f}" if any(price) else line


class Chat:
    """Asks a provider; keeps every reply in the cache; counts what it costs."""

    def __init__(
        self,
        provider: Provider,
        *,
        cache: str | Path | None = None,
        recorded: bool = False,
        repairs: int = 2,
        budget: int = 0,
    ):
        """Args.

        provider: the model; under ``recorded`` only its identity counts.
        cache: folder of the replies; None: none are kept.
        recorded: every reply must be in the cache; nothing is sent.
        repairs: further replies, each with what is wrong with the one before.
        budget: tokens of a run, prompts and replies; 0: no limit.
        """
        if repairs < 0 or budget < 0:
            raise ValueError(
                f"repairs and budget must be >= 0, got {repairs} and {budget}"
            )
        if recorded and cache is None:
            raise ValueError("recorded replies need the folder of their cache")
        self.provider, self.recorded = provider, recorded
        self.cache = None if cache is None else Path(cache).expanduser()
        self.repairs, self.budget, self.usage = repairs, budget, Usage()
        self._lock = threading.Lock()

    def reply(
        self, messages: Messages, schema: Schema | None = None, sample: int = 0
    ) -> Reply:
        """The reply to messages, from the cache where it has one.

        Args:
          messages: {"role", "content"} each.
          schema: JSON schema of the reply.
          sample: number of the draw; another one is another reply.

        Raises:
          ValueError: recorded, and not in the cache; a damaged file of it; the budget is
            spent; what the provider refuses.
          Unreachable: see ``Endpoint``.
        """
        path = self._path(messages, schema, sample)
        known = self._read(path)
        if known is not None:
            self._count(requests=1, cached=1)
            return known
        if self.recorded:
            raise ValueError(
                f"no recorded reply {path}; run it once with recorded=False to record it"
            )
        spent = self.usage.prompt_tokens + self.usage.completion_tokens
        if self.budget and spent >= self.budget:
            raise ValueError(
                f"{spent:,} tokens are spent, the budget is {self.budget:,}; what was "
                "answered is in the cache: a larger budget continues"
            )
        reply = self.provider(messages, schema)
        self._count(
            requests=1, retries=reply.tries - 1, prompt_tokens=reply.prompt_tokens,
            completion_tokens=reply.completion_tokens,
        )  # fmt: skip
        self._write(path, {"messages": list(messages), "reply": reply._asdict()})
        return reply

    def structured(
        self,
        messages: Messages,
        schema: Schema,
        check: Callable[[Any], Sequence[str]] = lambda value: (),
        sample: int = 0,
    ) -> Any:
        """A JSON value that passes ``check``; what is wrong is returned to the model.

        Args:
          messages, schema, sample: see ``reply``.
          check: value -> what is wrong with it, a text each.

        Raises:
          BadReply: none after all repairs; the message has the last problems.
        """
        talk, problems = list(messages), ["no reply"]
        for attempt in range(self.repairs + 1):
            if attempt:
                self._count(repairs=1)
            reply = self.reply(talk, schema, sample)
            try:
                value = replies.parse(reply.text)
                problems = list(check(value))
            except ValueError as e:
                problems = [str(e)]
                if reply.cut:
                    problems = ["the reply was cut at the limit of tokens; be shorter"]
            else:
                if not problems:
                    return value
            text = "\n".join(f"- {problem}" for problem in problems[:20])
            talk += [
                {"role": "assistant", "content": reply.text},
                {"role": "user", "content": f"This is wrong:\n{text}\nCorrect all of it "
                 "and reply with the whole value again."},
            ]  # fmt: skip
        self._count(failed=1)
        raise BadReply(
            f"no valid reply after {self.repairs} repairs: {'; '.join(problems[:3])}"
        )

    def estimate(
        self, requests: Iterable[tuple[Messages, Schema | None]], tokens: int = 1000
    ) -> Usage:
        """What requests are going to cost at most, before they are sent.

        Args:
          requests: messages and schema of each.
          tokens: expected of a reply.
        """
        count = cached = prompt = 0
        for messages, schema in requests:
            count += 1
            if self._read(self._path(messages, schema, 0)) is not None:
                cached += 1
                continue
            size = sum(len(m["content"]) for m in messages)
            prompt += (size + len(json.dumps(schema))) // CHARACTERS_PER_TOKEN
        return Usage(count, cached, prompt_tokens=prompt,
                     completion_tokens=(count - cached) * tokens)  # fmt: skip

    def _count(self, **more: int) -> None:
        with self._lock:
            now = self.usage._asdict()
            self.usage = Usage(**{k: v + more.get(k, 0) for k, v in now.items()})

    def _path(
        self, messages: Messages, schema: Schema | None, sample: int
    ) -> Path | None:
        if self.cache is None:
            return None
        content = [dict(self.provider.identity), list(messages), schema, sample]
        text = json.dumps(content, sort_keys=True, ensure_ascii=False)
        return self.cache / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def _read(self, path: Path | None) -> Reply | None:
        if path is None or not path.exists():
            return None
        try:
            reply = Reply(**replies.loads(path.read_text(encoding="utf-8"))["reply"])
            if not isinstance(reply.text, str):
                raise ValueError("its text is none")
            return reply
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(
                f"{path}: a damaged reply ({e}); remove the file to ask again"
            ) from None

    def _write(self, path: Path | None, content: dict) -> None:
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
        handle, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise


def every(
    function: Callable[[T], R], items: Iterable[T], workers: int = 4
) -> list[R | BadReply]:
    """``function`` of every item, in order, several at a time.

    Args:
      function: asks; its ``BadReply`` stands in the result's place.
      items: its arguments.
      workers: threads.

    Raises:
      ValueError and OSError of ``function``; replies until then are in the cache.
    """

    def one(item: T) -> R | BadReply:
        try:
            return function(item)
        except BadReply as e:
            return e

    pool = ThreadPoolExecutor(max(1, workers))
    try:
        return list(pool.map(one, items))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
