"""Lottery Ticket and One Shot: the same engine, so that only the count differs (issue 2; the paper's baselines)."""

import numpy as np
import pytest
from helpers import SCOPES, arrays, convnet, masks_of
from test_iterative import trainer

from torch_sap import LotteryTicket, OneShot


@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.25, 0.5])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("baseline", [LotteryTicket, OneShot])
def test_baselines_prune_a_fixed_ratio(baseline, scope, ratio):
    model = convnet()
    stepper = baseline(model, ratio=ratio, scope=scope)
    trainer((6, 2, 6, 6))(model)
    weights, masks = arrays(model)
    record = stepper.step()
    for name, group in record.groups.items():
        assert group.c.tolist() == [round(ratio * d) for d in group.d.tolist()], name
    if scope == "layer":
        for name, mask in masks_of(model).items():
            order = np.argsort(np.abs(weights[name]).reshape(-1), kind="stable")[: round(ratio * masks[name].size)]
            assert set(np.flatnonzero(~mask.numpy().reshape(-1))) == set(order)
