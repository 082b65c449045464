"""The table of types says what safetensors, torch and numpy say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fxckpt.store.dtypes import DTYPES, OF_TORCH, PARTS, numpy_dtype


@pytest.mark.parametrize("name", DTYPES)
def test_a_type_has_the_same_size_and_kind_in_torch_and_numpy(name):
    kind = getattr(torch, DTYPES[name].torch)
    assert kind.itemsize == DTYPES[name].nbytes
    if (known := numpy_dtype(name)) is not None:
        assert torch.from_numpy(np.zeros(1, known)).dtype == kind


@pytest.mark.parametrize("name", PARTS)
def test_a_complex_number_is_two_numbers_of_its_parts_type(name):
    item = np.dtype(name).itemsize if name.startswith("<") else getattr(torch, name).itemsize
    assert item == 2 * DTYPES[PARTS[name]].nbytes


def test_every_type_that_a_model_may_have_opens_in_safetensors(tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = {name: torch.zeros(3).to(getattr(torch, name)) for name in OF_TORCH if name != "float8_e8m0fnu"}
    save_file(tensors, tmp_path / "all")
    assert {name: tensor.dtype for name, tensor in load_file(tmp_path / "all").items()} == {
        name: tensor.dtype for name, tensor in tensors.items()
    }


def test_the_one_type_that_safetensors_makes_no_tensor_of_is_in_its_format():
    from safetensors import deserialize

    text = b'{"a":{"dtype":"F8_E8M0","shape":[3],"data_offsets":[0,3]}}'
    [(name, found)] = deserialize(len(text).to_bytes(8, "little") + text + b"abc")
    assert (name, found["dtype"], bytes(found["data"])) == ("a", "F8_E8M0", b"abc")
