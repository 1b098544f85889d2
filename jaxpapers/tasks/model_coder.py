"""A language model that codes parsed letters, through the chat client."""

from pathlib import Path
from typing import Any

from jaxpapers.data import chat
from jaxpapers.papers.peer_review import extraction
from jaxpapers.tasks import local_model


class Coder:
    """Codes files; asks an endpoint, or a provider that is given.

    ``extraction.extract`` needs one function of it, ``Chat.structured``.
    """

    def __init__(self, options: Any, provider: Any = None):
        """Args.

        options: the config's group ``extract``.
        provider: a ``chat.Provider`` instead of the endpoint: a local model.
        """
        if provider is None and options.model == local_model.NAME:
            provider = local_model.provider(1024)
        if provider is None:
            url = {"url": options.url} if options.url else {}
            provider = chat.Endpoint(
                model=options.model, key=options.key, temperature=0.0, **url
            )
        cache = options.cache or str(Path.home() / ".cache" / "jaxpapers" / "replies")
        self.chat = chat.Chat(provider, cache=cache, recorded=options.recorded)

    def __call__(self, file: Any) -> extraction.Extraction:
        """Opinions of a file; reports without a valid reply are listed."""
        return extraction.extract(self.chat.structured, file, chat.BadReply)

    def estimate(self, files: Any) -> str:
        """What coding files is going to cost at most, before anything is sent."""
        asked = [r for f in files for r in extraction.requests(f)]
        return self.chat.estimate(asked).text()

    def usage(self) -> str:
        """What was asked and spent so far."""
        return self.chat.usage.text()
