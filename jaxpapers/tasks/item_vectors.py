"""Vectors of items' texts by all-MiniLM-L6-v2, computed once and cached."""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence

import numpy as np

from jaxpapers.data import fetch, tokenizer, weights
from jaxpapers.nets.encoder import Encoder, encode

WIDTH = 384
_MOST_TOKENS = 256  # of a text, as the model was trained


def of_texts(texts: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Sentence vectors (N, 384) of length 1, from the cache where they are.

    Args:
      texts: of the items.
      names: of the items, for the error.

    Raises:
      ValueError: items without text.
      FileNotFoundError: the model could not be fetched, see ``data.fetch``.
    """
    empty = [name for name, text in zip(names, texts) if not text.strip()]
    if empty:
        raise ValueError(
            f"{len(empty)} of {len(texts)} items have no text to make a vector of: "
            f"{', '.join(empty[:10])}; give vectors.npy or drop them"
        )
    digest = hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16]
    folder = fetch.cache_folder() / "vectors"
    path = folder / f"minilm-l6-{digest}.npy"
    if path.exists():
        x = np.load(path, allow_pickle=False)
        if x.shape == (len(texts), WIDTH):
            return x
    x = encoded(texts)
    folder.mkdir(parents=True, exist_ok=True)
    # Renamed into place: a file that is there is complete.
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as f:
        np.save(f, x)
    os.replace(f.name, path)
    return x


def encoded(texts: Sequence[str]) -> np.ndarray:
    """Sentence vectors (N, 384), computed."""
    folder = fetch.get("minilm-l6")
    model, ids = weights.load_encoder(folder), tokenizer.load(folder)
    rows = [ids.encode(text, special=True, most=_MOST_TOKENS) for text in texts]
    return encode(Encoder(**model.net), model.params, rows)
