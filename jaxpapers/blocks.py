"""Groups of fields that several configs share, as dicts for ``ConfigDict``.

For the files in configs/ and for your own: ``from jaxpapers import blocks``.
"""

from typing import Any


def train(
    steps: int,
    *,
    eval_every: int = 0,
    save_minutes: float = 5.0,
    sample: int = 0,
    **fields: Any,
) -> dict[str, Any]:
    """The group ``train``, which ``jaxpapers.train`` and ``jaxpapers.run`` read.

    Args:
      steps: optimizer steps, or iterations of a method that has several per iteration.
      eval_every: steps between evaluations; 0: only at the end.
      save_minutes: minutes between checkpoints.
      sample: size of the sample drawn at the end; 0: none.
      fields: what only this config has, or another value of ``accumulate`` (micro-batches
        of a step), ``seed`` (of the parameters and of the steps' randomness),
        ``save_every`` (steps between checkpoints; 0: by minutes alone), ``keep``
        (checkpoints kept) and ``init_from`` (workdir whose parameters start the run).
    """
    return {
        "steps": steps,
        "accumulate": 1,
        "seed": 0,
        "eval_every": eval_every,
        "save_every": 0,
        "save_minutes": save_minutes,
        "keep": 2,
        "init_from": "",
        "sample": sample,
        **fields,
    }


def click_data(source: str, *, history: int, batch: int, **fields: Any) -> dict:
    """The group ``data`` of the click models, see ``jaxpapers.tasks.click``.

    Args:
      source: data set.
      history: last items of a user's past that a row has.
      batch: rows of a training step.
      fields: what only this config has, or another value of a field below.
    """
    return {
        "task": "click",
        "source": source,
        "path": "",  # folder of the source's files; ml-100k is fetched without
        "target": "next_item",  # of ml-100k; rating
        "order": "row",  # of equal times in ml-100k; id
        "categories": "first",  # genre of a film in ml-100k; combination
        "max_id": 0,  # of files whose ids number rows; 0: a million, or 100 per row
        "split": "test",  # validation: of held-out training users, to tune on
        "shuffled": False,  # permute the labels: nothing can be learned
        "baselines": True,  # train Base, logistic regression and DIN beside the model
        "item_buckets": 0,  # rows that all items share by a hash; 0: one each
        "history": history,
        "batch": batch,
        "eval_batch": 512,
        "seed": 1234,
        **fields,
    }


def click_optim(name: str, tables: str, lr: float, **fields: Any) -> dict:
    """The group ``optim`` of the click models, see ``optim.rows``.

    Args:
      name: optimizer of the dense parameters: adam, adagrad or sgd.
      tables: of the embedding tables: lazy_adam, row_adagrad or row_sgd on the rows that
        a batch reads, dense: ``name`` on all rows.
      lr: learning rate of both.
      fields: further fields of ``optim.Options``, or another value of ``schedule`` or
        ``clip``.
    """
    return {
        "name": name,
        "tables": tables,
        "lr": lr,
        "schedule": "constant",
        "clip": 0.0,
        **fields,
    }


ML_100K = {"item_vocab": 1684, "cate_vocab": 21, "user_vocab": 945, "rows_multiple": 8,
           "item_dim": 16, "cate_dim": 8, "std": 0.05, "item_bias": True}  # fmt: skip
"""Fields of a click model's ``net`` that the presets on MovieLens-100k share."""
