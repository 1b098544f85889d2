"""A task of the tests that trains nothing: folds, curves, tables, files."""

from jaxpapers.study import Data, Finding, Row, Study, Table


def abstract(config):
    """Nothing to shape."""
    del config
    return Data(None, {})


def read(config):
    """One number a file."""
    return abstract(config)._replace(summary=f"numbers of {config.data.path!r}")


def study(name, config, data, mesh):
    """Two rows in two folds."""
    del name, data, mesh

    def row(label, column, value):
        def measure():
            return Finding(
                {"value": value},
                [Table("words", ("word", "count"), [["a[b]", 3]])],
                {"value against time": ((0, 1, 2), (0, value, value))},
                {"order.csv": "a,b\n", "arrays.npz": {"x": [value]}, "raw": b"\x00"},
            )

        return Row(label, None, measure, column)

    def rows(seed):
        scale = config.data.scale + seed
        return [
            row(label, column, scale * value)
            for label, value in (("ours", 2.0), ("theirs", 1.0))
            for column in ("left", "right")
        ]

    return Study("value of constants", "value", True, rows)
