import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def _no_search_through_imports():
    """accelerate collects garbage after each training, most of that time among what was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
