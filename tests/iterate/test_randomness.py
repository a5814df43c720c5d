import random

import numpy as np
import pytest
import torch

from torch_sap.files.checkpoint import read, write
from torch_sap.iterate.randomness import random_state, set_random_state


def draw():
    """Some random numbers of every kind, an odd number of Gaussians among them: their generators keep the second."""
    return [
        *(random.random() for _ in range(3)),
        random.gauss(0, 1),
        *np.random.rand(700).tolist(),
        np.random.randn(),
        *torch.rand(700).tolist(),
        torch.randn(()).item(),
    ]


@pytest.fixture(autouse=True)
def _seeds():
    random.seed(1)
    np.random.seed(1)


def test_random_numbers_continue_from_a_file(tmp_path):
    draw()
    write(tmp_path / "state", random_state())
    expected = draw(), draw()
    draw()
    set_random_state(read(tmp_path / "state"))
    assert (draw(), draw()) == expected
    assert expected[0] != expected[1]


@pytest.mark.parametrize("generator", [np.random.PCG64, np.random.Philox, np.random.SFC64, np.random.MT19937])
def test_any_generator_of_numpy(generator, tmp_path):
    own = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(generator(3))
        draw()
        write(tmp_path / "state", random_state())
        expected = draw()
        set_random_state(read(tmp_path / "state"))
        assert draw() == expected
    finally:
        np.random.set_bit_generator(own)


def test_another_number_of_devices_is_logged(caplog):
    state = {**random_state(), "cuda": [torch.zeros(16, dtype=torch.uint8)] * (torch.cuda.device_count() + 1)}
    if torch.cuda.is_available():
        state["cuda"][: torch.cuda.device_count()] = torch.cuda.get_rng_state_all()
    set_random_state(state)
    assert "CUDA devices were saved" in caplog.text
