"""Plain calls over async code."""

import asyncio
import threading

import pytest

from etude.runtime.loop import run_sync


async def where():
    await asyncio.sleep(0)
    return threading.current_thread().name


def test_without_a_running_loop_it_runs_right_here():
    assert run_sync(where()) == threading.current_thread().name


def test_inside_a_running_loop_it_runs_on_the_library_s_thread():
    async def cell():
        return run_sync(where())

    assert asyncio.run(cell()) == "etude-loop"


def test_errors_come_out():
    async def fail():
        raise KeyError("here")

    async def cell():
        run_sync(fail())

    with pytest.raises(KeyError, match="here"):
        run_sync(fail())
    with pytest.raises(KeyError, match="here"):
        asyncio.run(cell())
