"""One kind of table, one refusal."""

import pytest

from hvtrain.errors import ConfigError, DataError
from hvtrain.registry import Registry


def test_an_entry_is_one_decorated_function():
    table = Registry("colour")

    @table.add("red")
    def red():
        return 1

    assert red() == 1 and table == {"red": red} and table.find("red", key="run.colour") is red


def test_an_unknown_name_is_refused_with_the_nearest_or_all():
    table = Registry("colour", {"red": 1, "blue": 2}, also=("auto",))
    with pytest.raises(ConfigError) as near:
        table.find("bleu", key="run.colour")
    assert str(near.value) == "run.colour: no colour 'bleu'; did you mean 'blue'?"
    with pytest.raises(DataError) as far:
        table.find("x", key="clips.toml", error=DataError)
    assert str(far.value) == "clips.toml: no colour 'x'; choose one of: auto, blue, red"
    with pytest.raises(ConfigError, match="no colour 'auto'"):  # somebody else's name: known, and no entry
        table.find("auto", key="run.colour")
