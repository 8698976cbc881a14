import pytest
import torch


@pytest.fixture(autouse=True)
def _seed_and_one_thread():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def lengths_mask():
    """Right-padded mask bool[B, T] of the given lengths."""

    def make(lengths, width):
        return torch.arange(width) < torch.tensor(lengths).unsqueeze(1)

    return make
