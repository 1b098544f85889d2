"""Groups of fields that several configs share, as dicts for ``ConfigDict``.

For the files in configs/ and for your own: ``from jaxpapers import blocks``.
"""

from typing import Any

FIELDS = {
    "task": "module of jaxpapers.tasks that reads the data and makes the comparison",
    "source": "data set",
    "path": "files or folder of the user's own",
    "environment": "that the agent acts in",
    "batch": "rows of a training step, over all devices and processes",
    "eval_batch": "rows of a step of an evaluation",
    "eval_count": "samples of an evaluation",
    "context": "tokens of a row",
    "history": "last items of a user's past that a row has",
    "spread": "standard deviation of the noise of a synthetic source",
    "validation_fraction": "share of the text that is held out",
    "seed": "of the draws",
    "steps": "optimizer steps, or iterations of a method that has several per iteration",
    "accumulate": "micro-batches of a step",
    "eval_every": "steps between evaluations; 0: only at the end",
    "save_every": "steps between checkpoints; 0: by minutes alone",
    "save_minutes": "minutes between checkpoints; 0: by steps alone",
    "keep": "checkpoints kept",
    "init_from": "workdir whose parameters start the run",
    "init_only": "regex of the paths of parameters that init_from gives; empty: all",
    "log_images": "draw the model at every evaluation, which is measured whole for it",
    "sample": "size of the sample drawn at the end; 0: none",
    "prompt": "start of the sample",
    "temperature": "of the sample; 0: the likeliest token",
    "tables": "optimizer of the embedding tables: lazy_adam, row_adagrad or row_sgd on "
    "the rows that a batch reads; dense: that of all other parameters on all rows",
    "ema": "decay of the moving average of the parameters; 0: none",
    "value_lr": "learning rate of the value net",
    "critic_lr": "learning rate of the critic",
    "members": "independent agents in one program, each with keys of its own",
}  # fmt: skip
"""What fields mean that several configs have, for their help."""


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
      steps: see ``FIELDS``, as for all others.
      eval_every: steps between evaluations.
      save_minutes: between checkpoints.
      sample: size.
      fields: what only this config has, or another value of a field below.
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
        "alone": False,  # train this model only, none of those beside it
        "log_images": False,
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
        "target": "next_item",  # of ml-100k; or rating
        "order": "row",  # of equal times in ml-100k; or id
        "categories": "first",  # genre of a film in ml-100k; or combination
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
