"""The scripts under examples/ on a small setting."""

import geometry_grid
import pytest


@pytest.mark.parametrize("case", geometry_grid.cases(), ids=lambda case: case.name)
def test_every_layer_of_the_grid_passes_in_every_format(case):
    for format in geometry_grid.OURS.values():
        assert geometry_grid.verdict(geometry_grid.ours(format), case) == ("pass", "")


def test_the_grid_tells_what_is_wrong():
    """A conversion that forgets the padding is found out, as is one that fails, or does nothing."""
    case = next(case for case in geometry_grid.cases() if case.name == "padding 1")

    def forgetful(layer):
        layer.padding = (0, 0)
        return layer, layer.weight.detach()

    def off(layer):
        return layer, 1.1 * layer.weight.detach()

    def dense(layer):
        raise geometry_grid.LeftDense("as it is")

    assert geometry_grid.verdict(forgetful, case)[0] == "wrong"
    assert "of the kernel 0.1" in geometry_grid.verdict(off, case)[1]
    assert geometry_grid.verdict(lambda layer: 1 / 0, case)[0] == "raises"
    assert geometry_grid.verdict(dense, case) == ("dense", "as it is")
