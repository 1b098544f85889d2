"""Configs of methods that start from a pretrained net."""

import dataclasses
from typing import Any

GROUPS = ("data", "net", "noise", "sampler", "optim", "method", "train")


def pretraining(config: Any, net: type, method: type) -> Any:
    """Config of the pretraining run that a config of tuning starts from.

    It has the fields that pretraining reads and no others, so that configs which differ
    in tuning only give equal ones. ``data.batch``, ``train.steps``, ``train.eval_every``
    and the group ``optim`` are those of the group ``pretrain``.

    Args:
      config: with groups ``GROUPS`` and ``pretrain``. With ``method.stage="pretrain"``
        the batch and the steps are already those of pretraining. A config that this
        function returned is returned as it is.
      net: dataclass of the group ``net`` in pretraining.
      method: dataclass of the group ``method`` in pretraining. Its fields are read from
        the groups ``pretrain`` and ``method``.

    Returns:
      A locked config with the groups ``GROUPS`` and ``method.stage="pretrain"``.
    """
    if "pretrain" not in config:
        return config
    stage = config.copy_and_resolve_references().unlock()
    own = stage.pretrain
    if stage.method.stage != "pretrain":
        stage.data.batch = own.batch
        stage.train.update(steps=own.steps, eval_every=own.eval_every, init_from="")
    fields = {**stage.method, **own, "stage": "pretrain"}
    fields = {name: fields[name] for name in _names(method) if name in fields}
    for group in [name for name in stage if name not in GROUPS]:
        del stage[group]
    for name in [name for name in stage.net if name not in _names(net)]:
        del stage.net[name]
    del stage.optim, stage.method
    stage.optim = own.optim
    stage.method = fields
    return stage.lock()


def _names(options: type) -> list[str]:
    return [field.name for field in dataclasses.fields(options)]
