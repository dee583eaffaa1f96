import pytest
import torch

from bissl_hf.data.batches import batch_rows, split_rows


def test_rows_are_those_of_the_first_tensor():
    assert batch_rows({"scale": torch.tensor(2.0), "name": "x", "x": torch.zeros(5, 2)}) == 5


@pytest.mark.parametrize(("inputs", "named"), [({}, "nothing"), ({"text": ["a"], "n": torch.tensor(1)}, "text, n")])
def test_a_batch_without_rows_is_refused(inputs, named):
    with pytest.raises(ValueError, match=f"must hold at least one tensor with rows; this one has {named}"):
        batch_rows(inputs)


def test_parts_of_a_batch_with_their_shares():
    inputs = {"x": torch.arange(7), "y": torch.arange(14).view(7, 2), "scale": torch.tensor(3.0), "name": "both"}
    parts = split_rows(inputs, 3)
    assert [share for _, share in parts] == [
        2 / 7,
        2 / 7,
        3 / 7,
    ]
    for name in ("x", "y"):
        assert torch.equal(torch.cat([part[name] for part, _ in parts]), inputs[name])
    assert all(part["scale"] is inputs["scale"] and part["name"] == "both" for part, _ in parts)


@pytest.mark.parametrize("size", [None, 7, 8])
def test_a_batch_that_fits_stays_whole(size):
    inputs = {"x": torch.arange(7)}
    ((part, share),) = split_rows(inputs, size)
    assert part is inputs
    assert share == 1.0
