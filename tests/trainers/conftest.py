import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def _no_search_through_imports():
    """accelerate collects garbage after each training; what was imported takes most of that time and stays."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
