"""What was written is read again, bit for bit, or not at all."""

import pytest
import safetensors.torch
import torch

from ffnprobe.tensors import NAMES, Damaged, stored, write_tensors

TENSORS = {
    **{name: torch.arange(5).to(dtype) for dtype, name in NAMES.items()},
    "a number": torch.tensor(2.5, dtype=torch.float64),
    "nothing": torch.empty(3, 0),
    "across": torch.arange(6.0).view(2, 3).mT,
}


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "some.safetensors"
    return path, *write_tensors(path, TENSORS, {"about": [1, "ü"]})


def test_every_type_and_shape_comes_back(written):
    path, size, digest = written
    with stored(path, "another", digest) as (tensors, about, found):
        assert tensors.keys() == TENSORS.keys() and (about, found) == ({"about": [1, "ü"]}, digest)
        for name, tensor in TENSORS.items():
            assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)
    assert path.stat().st_size == size


def test_any_reader_of_safetensors_opens_it(written):
    read = safetensors.torch.load_file(written[0])
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())


def test_other_bytes_and_a_missing_file_are_damage(written, tmp_path):
    for path, said in ((written[0], "has other bytes"), (tmp_path / "none", "none cannot be read")):
        with pytest.raises(Damaged, match=said), stored(path, "another"):
            pass


def test_a_file_that_shrinks_while_it_is_read_is_damaged(tmp_path):
    path = tmp_path / "some.safetensors"
    _, digest = write_tensors(path, {"many": torch.zeros(10**5)}, {})
    with stored(path, digest) as (tensors, *_):
        path.open("rb+").truncate(10**5)
        with pytest.raises(Damaged, match="become shorter"):
            list(tensors.values())
