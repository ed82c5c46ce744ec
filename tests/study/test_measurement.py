"""What a metric returns, on paper: shapes that fit, and how it prints."""

import numpy as np
import pytest

from moe.study.measurement import Axis, Measurement

LAYERS = Axis("layer", ("0", "1"))
EXPERTS = Axis("expert", ("0", "1", "2"))


def measurement(values: object, *axes: Axis, **changes: object) -> Measurement:
    return Measurement("load", "Load", "Read it so.", np.asarray(values), axes, **changes)


def test_values_must_fit_their_axes() -> None:
    with pytest.raises(ValueError, match=r"load: values of shape \(2,\) on axes of lengths \(3,\)"):
        measurement([1.0, 2.0], EXPERTS)
    with pytest.raises(ValueError, match="broadcast"):
        measurement([1.0, 2.0], LAYERS, chance=np.ones(3))


def test_over_chance_needs_a_chance() -> None:
    load = measurement([[0.5, 0.25, 0.25]] * 2, LAYERS, EXPERTS, chance=np.asarray(0.25))

    assert load.over_chance.tolist() == [[2.0, 1.0, 1.0]] * 2
    with pytest.raises(ValueError, match="no chance value"):
        _ = measurement([1.0, 2.0], LAYERS).over_chance


def test_a_frame_has_a_row_a_value_and_a_column_an_axis() -> None:
    frame = measurement([[1, 2, 3], [4, 5, 6]], LAYERS, EXPERTS, chance=np.asarray([[2], [5]])).frame()

    assert list(frame.columns) == ["layer", "expert", "value", "chance"]
    assert frame.iloc[4].tolist() == ["1", "1", 5, 5]


def test_it_prints_in_a_line() -> None:
    assert repr(measurement([1.0, np.nan], LAYERS)) == "<Measurement load [layer 2]: 1 to 1>"
    assert repr(measurement(3.5)) == "<Measurement load [a number]: 3.5 to 3.5>"
    assert repr(measurement([np.nan, np.nan], LAYERS)) == "<Measurement load [layer 2]: nothing measured>"
