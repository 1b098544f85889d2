"""VersaPRM: recorded sequences and losses, scores, search, scorers, and its contract."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers import mesh as meshes
from jaxpapers.method import State
from jaxpapers.papers import versaprm
from jaxpapers.papers.versaprm import (
    Net,
    augmentation,
    encoding,
    metrics,
    network,
    objective,
    scorers,
)
from tests.contract import Contract, grid
from tests.programs import KEY, params_like, together

CONTRACT = Contract(
    small={
        "data.batch": 8, "data.examples": 8, "data.length": 64, "data.eval_batch": 8,
        "data.questions": 6, "data.solutions": 4, "data.search_questions": 0,
        "net.width": 16, "net.heads": 2, "net.layers": 1, "net.unroll": 1,
        "net.init_std": 0.3, "optim.name": "sgd", "optim.lr": 1.0, "optim.clip": 1.0,
        "optim.weight_decay": 0.0, "optim.schedule": "constant", "optim.warmup": 0.0,
        "optim.cooldown": 0.0, "train.steps": 20, "method.language": 0.0,
    },
    refused={
        "net.heads": (3, "net.width must be a multiple of net.heads"),
        "net.head": ("three", "net.head must be one of"),
        "net.plus": (2, "must differ"),
        "net.minus": (10**6, "net.minus must be below"),
        "method.objective": ("outcome", "method.objective must be one of"),
        "optim.name": ("x", "optim.name"),
    },
)  # fmt: skip
NET = Net(vocab_size=20, width=16, heads=2, layers=2, init_std=0.3)
# Ids of the recorded pieces of text, as Qwen3's tokenizer gives them.
PIECES = {
    "Question: What is 2+3?\nA. 4\nB. 5 \n\n": [
        14582, 25, 3555, 374, 220, 17, 10, 18, 5267, 32, 13, 220, 19, 198, 33, 13, 220,
        20, 4710,
    ],
    "2+3 means adding. \n\n\n\n": [17, 10, 18, 3363, 7842, 13, 22701],
    "The sum is 5. \n\n\n\n": [785, 2629, 374, 220, 20, 13, 22701],
    "The answer is (B). \n\n\n\n": [785, 4226, 374, 320, 33, 568, 22701],
    "The sum is 6. \n\n\n\n": [785, 2629, 374, 220, 21, 13, 22701],
    "2+3 is 6. \n\n\n\n": [17, 10, 18, 374, 220, 21, 13, 22701],
    "So none match. \n\n\n\n": [4416, 6857, 2432, 13, 22701],
    "The answer is (A). \n\n\n\n": [785, 4226, 374, 320, 32, 568, 22701],
    # The space of the step and that of the separator make other tokens of both.
    "Trailing space  \n\n\n\n": [1282, 14277, 3550, 256, 1022],
    "Trailing space \n\n\n\n": [1282, 14277, 3550, 22701],
    "ok. \n\n\n\n": [562, 13, 22701],
    "fine \n\n\n\n": [62057, 22701],
    "x \n\n\n\n": [87, 22701],
}  # fmt: skip


def tokenize(text):
    return PIECES[text]


def recorded(case):
    return json.loads((case.folder / case.entry["file"]).read_text())


@pytest.mark.parity("lm", only=lambda entry: entry.get("kind") == "versaprm")
def test_recorded_sequences(case):
    """Every sequence of the authors' data sets; they do not strip the steps."""
    record = recorded(case)["tokenise"]
    assert "Qwen3" in record["tokenizer"] and len(record["cases"]) == 12
    for x in record["cases"]:
        questions = record["questions"]
        if not x["use_augs"]:
            questions = [
                {
                    **q,
                    "chain_of_thoughts": [
                        {**s, "augs": []} for s in q["chain_of_thoughts"]
                    ],
                }
                for q in questions
            ]
        rows, counts = versaprm.encode_all(
            tokenize, questions, max_length=x["max_length"] or 0,
            label_last_n=x["label_last_n"], strip=False,
        )  # fmt: skip
        assert len(rows) == len(x["rows"]) == counts.encoded
        assert counts.unlabelled == 1
        for row, expected in zip(rows, x["rows"]):
            assert row.ids.tolist() == expected["input_ids"]
            assert row.labels.tolist() == expected["labels"]


@pytest.mark.parity("lm", only=lambda entry: entry.get("kind") == "versaprm")
def test_recorded_loss(case):
    """Loss, its gradient and the scores, with the logits as hidden states."""
    record = recorded(case)["loss"]
    logits, labels = np.array(record["logits"]), np.float64(record["labels"])
    vocab = logits.shape[-1]
    net = Net(
        vocab_size=vocab, width=vocab, heads=1, layers=1, dtype="float64",
        plus=record["plus_id"], minus=record["minus_id"],
    )  # fmt: skip

    def compute(x):
        decoder = {"head": {"kernel": jnp.eye(vocab)}}
        two = network.two_logits({}, decoder, x, net)
        return objective.two_way_loss(two, jnp.asarray(labels))[0], two

    with jax.enable_x64():
        (value, two), grad = together(jax.value_and_grad(compute, has_aux=True), logits)
    assert value == pytest.approx(record["loss"], rel=1e-6)
    np.testing.assert_allclose(grad, record["grad"], atol=1e-6)
    scores = 1 / (1 + np.exp(two[..., 0] - two[..., 1]))
    np.testing.assert_allclose(scores, record["step_scores"], atol=1e-6)


def test_trailing_space_is_stripped_or_refused():
    make = functools.partial(
        versaprm.encode_example, tokenize, "Question: What is 2+3?\nA. 4\nB. 5",
        ["Trailing space ", "ok."], [1, -1], separator=22701,
    )  # fmt: skip
    [row] = make()
    assert row.ids[19:].tolist() == [1282, 14277, 3550, 22701, 562, 13, 22701]
    assert row.labels[[22, 25]].tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="must end in the separator 22701"):
        make(strip=False)


def letters(text):
    """A tokenizer of characters, the separator being id 2."""
    return [ord(c) for c in text.replace(" \n\n\n\n", "\x02").replace(" \n\n", "\x01")]


def test_options_of_labels():
    def row(labels, **fields):
        [x] = versaprm.encode_example(letters, "q", ["a", "b", "c"], labels, **fields)
        return x.labels[x.labels >= 0].tolist(), x.ids.tolist()

    whole = [113, 1, 97, 2, 98, 2, 99, 2]
    assert row([1, 0, 1]) == ([1, 0], whole[:6])
    assert row([1, -1, 1], stop_at_error=False) == ([1, 0, 1], whole)
    soft, ids = row([0.75, 0.5, 0.25])
    assert (soft, ids) == ([0.75, 0.5, 0.25], whole)
    assert row([1, 1, 1], last_only=True) == ([1], whole)
    assert row([1, 0, 1], last_only=True) == ([0], whole[:6])
    assert row([1, 1, 1], label_last_n=None)[0] == [1] * 6
    assert versaprm.encode_example(letters, "q", ["a"], None) == []


def test_refused_examples():
    make = functools.partial(versaprm.encode_example, letters, "q", separator=2)
    rows = [encoding.Encoded(np.int32([1, 2]), np.float32([-100, -100]))]
    good = [encoding.Encoded(np.int32([1, 2]), np.float32([-100, 1]))]
    aug = {"aug_step": "x", "aug_idx": 1, "aug_type": 0}
    calls = {
        "at least one step": lambda: make([], []),
        "step 1 of 2 is empty": lambda: make(["a", " "], [1, 1]),
        "got 1 labels for 2 steps": lambda: make(["a", "b"], [1]),
        "of which -100 would become True": lambda: make(["a"], [True]),
        "labels must be -1 or in 0 to 1": lambda: make(["a"], [2]),
        "label_last_n must be": lambda: make(["a"], [1], label_last_n=0),
        "must end in the separator": lambda: make(["a \n\n\n\n b"], [1]),
        "the question has the separator": lambda: versaprm.encode_example(
            letters, "q \n\n\n\n", ["a"], [1], separator=2
        ),
        "index in 0 to 0": lambda: make(["a"], [1], [aug]),
        "an augmentation lacks": lambda: make(["a"], [1], [{"aug_step": "x"}]),
        "all labels of sequence 0 are -100": lambda: versaprm.pack(rows, 4),
        "at most 1": lambda: versaprm.pack(good, 1),
        "record 0, solution 0": lambda: versaprm.encode_all(
            letters,
            [{"question": "q", "chain_of_thoughts": [{"steps": [], "labels": []}]}],
        ),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="would have become True"):
        objective.two_way_loss(jnp.zeros((2, 2)), jnp.zeros(2, bool))


def some_rows(count=5, seed=0):
    """Sequences that end in the separator 2 after every few tokens."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(count):
        ids, labels = [], []
        for _ in range(rng.integers(1, 4)):
            n = int(rng.integers(1, 4))
            ids += [*rng.integers(5, 20, n), 2]
            labels += [-100] * n + [float(rng.integers(0, 2))]
        rows.append(encoding.Encoded(np.int32(ids), np.float32(labels)))
    return rows


def params_of(net):
    return params_like(functools.partial(versaprm.init, net=net), KEY)


def test_two_columns_are_the_whole_vocabulary():
    """The same loss and gradients as cross-entropy on two logits out of all."""
    batch = jax.tree.map(jnp.asarray, versaprm.pack(some_rows(), 16))

    def whole(params):
        logits = network.all_logits(params, batch["ids"], batch["segments"], NET)
        two = jax.nn.log_softmax(logits[..., jnp.array([NET.minus, NET.plus])])
        y, counts = jnp.maximum(batch["labels"], 0), batch["labels"] >= 0
        nats = -(y * two[..., 1] + (1 - y) * two[..., 0])
        return jnp.where(counts, nats, 0).sum() / counts.sum()

    def columns(params):
        return versaprm.loss(params, batch, net=NET)[0]

    params = params_of(NET)
    a, b = together(
        lambda p: (jax.value_and_grad(whole)(p), jax.value_and_grad(columns)(p)), params
    )
    assert a[0] == pytest.approx(float(b[0]), rel=1e-6)
    for x, y in zip(jax.tree.leaves(a[1]), jax.tree.leaves(b[1])):
        np.testing.assert_allclose(x, y, atol=2e-6)
    assert np.abs(a[1]["decoder"]["head"]["kernel"][:, 7]).max() == 0


def test_next_tokens_of_right_steps_are_learned():
    """Neither the question nor a wrong step is, nor what follows another sequence."""
    rows = some_rows(4)
    batch = encoding.fill(rows, [[0, 1], [2, 3]], 32)

    def compute(params):
        b = jax.tree.map(jnp.asarray, batch)
        logits = objective.all_logits(params, b["ids"], b["segments"], NET)
        both, told = versaprm.loss(params, b, net=NET, language=0.5)
        return (
            objective.language_loss(params, b, net=NET)[0], logits, both,
            told["process"], told["language"],
        )  # fmt: skip

    value, logits, both, process, language = together(compute, params_of(NET))
    logits = np.float64(logits)
    expected = []
    for i, t in np.argwhere(batch["labels"] > 0.5):
        if t and batch["segments"][i, t - 1] == batch["segments"][i, t]:
            row = logits[i, t - 1]
            expected.append(np.log(np.exp(row).sum()) - row[batch["ids"][i, t]])
    assert len(expected) > 3
    assert value == pytest.approx(np.mean(expected), rel=1e-5)
    assert language == pytest.approx(value, rel=1e-6)
    assert both == pytest.approx(float(process + 0.5 * language), rel=1e-6)


def test_adapters_drop_inputs_in_training_alone():
    net = dataclasses.replace(NET, lora_rank=2, lora_dropout=0.5)
    batch = encoding.fill(some_rows(4), [[0, 1], [2, 3]], 32)

    def compute(params):
        b = jax.tree.map(jnp.asarray, batch)
        keys = [None, jax.random.key(1), jax.random.key(1), jax.random.key(2)]
        return [versaprm.loss(params, b, key, net=net)[0] for key in keys]

    plain, one, again, other = together(compute, params_of(net))
    assert one == again and len({float(plain), float(one), float(other)}) == 3
    for fields in ({"lora_dropout": 0.1}, {"lora_rank": 2, "lora_dropout": 1.0}):
        with pytest.raises(ValueError, match="net.lora_dropout is a share below 1"):
            dataclasses.replace(NET, **fields)


def test_packed_sequences_do_not_see_each_other():
    """Scores and loss of several sequences in a row are those of a row each."""
    rows = some_rows(6)
    one = versaprm.pack(rows, 16)
    places = encoding.bins([len(r.ids) for r in rows], 24)
    several = encoding.fill(rows, places, 24)
    assert len(places) < len(rows)

    def compute(params):
        return [
            (
                versaprm.step_scores(params, b["ids"], b["segments"], net=NET, steps=9),
                versaprm.loss(params, b, net=NET)[0],
                objective.language_loss(params, b, net=NET)[0],
                versaprm.token_scores(params, (), b, net=NET),
            )
            for b in jax.tree.map(jnp.asarray, (one, several))
        ]

    (a, loss_a, next_a, tokens), (b, loss_b, next_b, _) = together(
        compute, params_of(NET)
    )
    single = [x[v] for x, v in zip(*a)]
    packed = [x[v] for x, v in zip(*b)]
    for numbers, scores in zip(places, packed):
        expected = np.concatenate([single[i] for i in numbers])
        np.testing.assert_allclose(scores, expected, rtol=2e-5)
    assert loss_a == pytest.approx(float(loss_b), rel=1e-5)
    assert next_a == pytest.approx(float(next_b), rel=1e-5)
    for i, row in enumerate(rows):
        ends = np.flatnonzero(row.ids == 2)
        np.testing.assert_allclose(tokens[i][ends], single[i], rtol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [{"head": "classes"}, {"tied": True}, {"head": "classes", "lora_rank": 2}],
    ids=str,
)
def test_heads_and_adapters(fields):
    """Two classes, a tied head, adapters: only what is tuned has a gradient."""
    net = dataclasses.replace(NET, **fields)
    batch = jax.tree.map(jnp.asarray, versaprm.pack(some_rows(3), 16))

    def compute(key):
        params = versaprm.init(key, net)
        plain = {k: v for k, v in params.items() if k != "lora"}
        grad = jax.grad(lambda p: versaprm.loss(p, batch, net=net)[0])(params)
        with_zero = versaprm.token_scores(params, (), batch, net=net)
        without = versaprm.token_scores(
            plain, (), batch, net=dataclasses.replace(net, lora_rank=0)
        )
        return grad, with_zero, without

    grad, with_zero, without = together(compute, jax.random.key(0))
    np.testing.assert_array_equal(with_zero, without)
    tuned = {k: max(float(np.abs(x).max()) for x in jax.tree.leaves(v))
             for k, v in grad.items()}  # fmt: skip
    if "lora_rank" in fields:
        assert tuned.pop("decoder") == 0
        # Adapters start with a product of zero, of which one factor moves first.
        assert {"lora", "classes"} == set(tuned)
    assert all(v > 0 for v in tuned.values())


def test_sharded_scores_are_those_of_one_device():
    batch = versaprm.pack(some_rows(8), 16)
    params = params_of(NET)
    score = functools.partial(versaprm.step_scores, net=NET, steps=4)
    expected = together(score, params, batch["ids"], batch["segments"])
    mesh = grid("2x4")
    placed = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data")))
    state = State(np.int32(0), params, (), (), jax.random.key(0))
    shardings = meshes.state_shardings(state, versaprm.rules(NET), mesh).params
    assert not all(x.is_fully_replicated for x in jax.tree.leaves(shardings))
    with jax.set_mesh(mesh):
        got = jax.jit(score)(
            jax.device_put(params, shardings), placed["ids"], placed["segments"]
        )
    np.testing.assert_allclose(got.scores, expected.scores, atol=1e-5)
    np.testing.assert_array_equal(got.valid, expected.valid)


def test_step_metrics_by_hand():
    y, p = [1, 1, 1, 0, 0], [0.9, 0.8, 0.3, 0.6, 0.1]
    got = metrics.step_metrics(y, p)
    expected = {
        "accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "specificity": 1 / 2,
        "npv": 1 / 2, "f1": 4 / 6, "f1_wrong": 2 / 4, "auc": 5 / 6,
    }  # fmt: skip
    assert got == pytest.approx(expected)
    alone = metrics.step_metrics([1, 1], [0.9, 0.1])
    assert math.isnan(alone["auc"]) and math.isnan(alone["specificity"])
    for labels, scores, message in (
        ([1, 2], [0.5, 0.5], "labels must be 0 or 1"),
        ([1, 0], [0.5, math.nan], "scores must be probabilities"),
        ([1], [0.5, 0.5], "two lists of one length"),
    ):
        with pytest.raises(ValueError, match=message):
            metrics.step_metrics(labels, scores)


def test_first_error_by_hand():
    scores = [[0.9, 0.2, 0.9], [0.9, 0.9], [0.4, 0.9], [0.9, 0.6, 0.7]]
    got = metrics.error_index_f1([1, -1, 1, -1], scores)
    assert got == pytest.approx({"wrong": 0.5, "right": 1.0, "f1": 2 / 3})
    assert metrics.predicted_error([0.5, 0.4], 0.5) == 1
    # A model that calls nothing wrong has no harmonic mean.
    never = metrics.error_index_f1([0, -1], [[0.9], [0.9]])
    assert never["f1"] == 0.0
    assert math.isnan(metrics.error_index_f1([-1], [[0.9]])["f1"])
    for message, call in {
        "has 1 steps and its first error at 1": ([1], [[0.5]]),
        "scores of 2 solutions": ([0], [[0.5], [0.5]]),
        "expected finite scores": ([0], [[math.nan]]),
    }.items():
        with pytest.raises(ValueError, match=message):
            metrics.error_index_f1(*call)


def test_scorers_of_other_families():
    """Where each reads, and which two numbers; softmax of these by hand."""
    ids = {"\n": [9], "q\n": [1, 9], "a": [5], "b": [6]}
    trl = scorers.FAMILIES["trl"]
    got = scorers.encode(trl, ids.__getitem__, "q", ["a", "b "])
    assert got.ids.tolist() == [1, 9, 5, 9, 6, 9]
    assert got.positions.tolist() == [3, 5]
    shepherd = scorers.FAMILIES["math-shepherd"]
    ids = {"q ": [1], "a ки\n": [5, 12902], "b ки\n": [6, 12902]}
    got = scorers.encode(shepherd, ids.__getitem__, "q", ["a", "b"])
    assert got.positions.tolist() == [2, 4]
    logits = np.zeros((5, 13000))
    logits[2, 648], logits[2, 387], logits[4, 387] = 2.0, 1.0, 3.0
    expected = [math.e**2 / (math.e**2 + math.e), 1 / (1 + math.e**3)]
    np.testing.assert_allclose(scorers.read(shepherd, logits, got.positions), expected)
    qwen = scorers.FAMILIES["qwen2.5-math-prm"]
    np.testing.assert_allclose(
        scorers.read(qwen, np.array([[0.0, 1.0]]), np.array([0])),
        [1 / (1 + math.exp(-1))],
    )
    chat = scorers.FAMILIES["rlhflow-deepseek"]

    def turns(given):
        made = []
        for role, text in given:
            made += [100, len(text), 101] if role == "user" else [102, 10, 103]
        return made

    got = scorers.encode(chat, lambda text: [], "q", ["a", "b"], turns)
    assert got.ids[got.positions + 1].tolist() == [10, 10]
    assert got.positions.tolist() == [3, 9]
    for message, call in {
        "found the tag 12902 1 times for 2": lambda: scorers.encode(
            shepherd, {**ids, "b ки\n": [6]}.__getitem__, "q", ["a", "b"]
        ),
        "needs chat": lambda: scorers.encode(chat, len, "q", ["a"]),
        "steps must not be empty": lambda: scorers.encode(trl, len, "q", [" "]),
        "got logits of width 5": lambda: scorers.read(
            qwen, np.zeros((1, 5)), np.array([0])
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_augmentation_counts_what_does_not_fit():
    records = [
        {
            "question": "q",
            "chain_of_thoughts": [
                {"steps": ["a", "b"], "labels": [1, 1]},
                {"steps": ["a"], "labels": [-1]},
            ],
        }
    ]
    replies = iter(
        [
            lambda t: augmentation.Rewrite(2, "c", t[0]),
            lambda t: augmentation.Rewrite(3, "c", t[0]),
            lambda t: augmentation.Rewrite(1, "c", "typo"),
            lambda t: augmentation.Rewrite(1, "a ", t[1]),
            lambda t: None,
        ]
    )
    asked = []

    def rewrite(question, steps, types):
        asked.append(types)
        return next(replies)(types)

    made = augmentation.augment(records, rewrite, times=5)
    first, second = made.records[0]["chain_of_thoughts"]
    assert [a["aug_idx"] for a in first["augs"]] == [1] and second["augs"] == []
    assert made.refused == {
        "no such step": 1, "type not offered": 1, "unchanged step": 1, "no answer": 1,
    }  # fmt: skip
    assert all(len(set(x)) == 2 and set(x) <= set(augmentation.TYPES) for x in asked)
    # What it gives is what sequences are made of.
    rows, counts = versaprm.encode_all(letters, made.records, separator=2)
    assert counts.augmentations == 1 and len(rows) == 3
    assert rows[1].ids.tolist() == [113, 1, 97, 2, 99, 2]
    assert rows[1].labels.tolist() == [-100] * 5 + [0]
