# %% [markdown]
# # A click model, from a CSV to served scores
#
# DIN on a log of your own in Taobao's columns (user, item, category, behaviour, second), trained
# by the same call as the command line, then served as a jitted function. The log here is drawn:
# users like two categories each.

# %%
import csv
import tempfile
from pathlib import Path

import jax
import numpy as np

from jaxpapers import run
from jaxpapers.folder import load_run

rng = np.random.default_rng(0)
folder = Path(tempfile.mkdtemp())
USERS, ITEMS, CATEGORIES = 2000, 400, 20
with (folder / "UserBehavior.csv").open("w") as file:
    write = csv.writer(file).writerow
    for user in range(USERS):
        liked = rng.choice(CATEGORIES, 2, replace=False)
        for action in range(20):
            category = (
                rng.choice(liked) if rng.random() < 0.9 else rng.integers(CATEGORIES)
            )
            item = category + CATEGORIES * rng.integers(ITEMS // CATEGORIES)
            write([user, item, category, "pv", 1_500_000_000 + 100 * user + action])

# %% [markdown]
# ## Train
#
# Readers say what they skipped and refuse what they do not understand, with file and line. The
# candidate is a user's last action, in half of the rows another item in its place (MIMN's
# protocol).

# %%
found = run.run(
    "din:smoke",
    [
        "--config.data.source=taobao",
        f"--config.data.path={folder}",
        "--config.train.steps=300",
    ],
    workdir=str(folder / "run"),
    quiet=True,
)

# %% [markdown]
# What a run returns: records for pandas or polars, pictures, and the folder.

# %%
for row in found.rows:
    print({k: row[k] for k in ("label", "trained", "auc")})

# %% [markdown]
# ## Serve
#
# `load_run` builds the model without reading the data; what does not depend on the candidate is
# computed once per user. Id 0 is padding and 1 is unknown, so the ids of a log begin at 2, in the
# order of the sorted raw ids.

# %%
name, config, method, mesh, state = load_run(str(folder / "run"))
score = jax.jit(method.predict)
FIRST = 2
history = FIRST + 3 + CATEGORIES * np.arange(10)  # Ten items of category 3.
candidates = FIRST + np.array([3 + CATEGORIES * 15, 7 + CATEGORIES * 15])
request = {
    "item": candidates[None].astype(np.int32),
    "cate": np.array([[FIRST + 3, FIRST + 7]], np.int32),
    "hist_item": history[None].astype(np.int32),
    "hist_cate": np.full((1, 10), FIRST + 3, np.int32),
    "length": np.array([10], np.int32),
}
logits = np.asarray(score(state.params, state.extra, request))
print("category 3 and category 7:", logits.round(2))
assert logits[0, 0] > logits[0, 1]
