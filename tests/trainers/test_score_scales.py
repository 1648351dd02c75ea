"""Scores in units of their environment's own deviation."""

import pytest
import torch
from accelerate import Accelerator

from etude.trainers.score_scales import ScoreScales


def test_each_environment_has_its_own_moments():
    scales = ScoreScales(Accelerator(cpu=True))
    mean, deviation = scales.update(["a", "b", "a", "b"], torch.tensor([0.0, 100.0, 2.0, 300.0]))
    torch.testing.assert_close(mean, torch.tensor([1.0, 200.0, 1.0, 200.0]))
    torch.testing.assert_close(deviation, torch.tensor([2.0, 20_000.0, 2.0, 20_000.0]).sqrt())
    mean, deviation = scales.update(["a", "c"], torch.tensor([4.0, 7.0]))
    assert mean.tolist() == [2.0, 7.0]
    assert deviation.tolist() == pytest.approx([2.0, 1.0]), "a single score scales nothing"

    resumed = ScoreScales(scales.accelerator)
    resumed.load_state_dict(scales.state_dict())
    both = [x.update(["b"], torch.tensor([50.0])) for x in (scales, resumed)]
    assert both[0] == both[1]
    assert both[0][0].item() == 150.0
