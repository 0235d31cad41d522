"""One pool of workers for all tests of this folder."""

from collections.abc import Iterator

import pytest
import torch

from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    torch.set_num_threads(1)
    made = Pool(8)
    yield made
    made.close()
