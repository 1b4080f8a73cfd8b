import pytest
import torch
from hypothesis import settings

# The same examples on every machine and every run; no data base of failures, no wall-clock limits on shared cores.
settings.register_profile("methods", derandomize=True, deadline=None, database=None, max_examples=10)
settings.load_profile("methods")


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Tensors of a few numbers are slower on several threads, on busy cores a hundred times."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
