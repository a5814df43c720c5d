"""One rule chooses the metric for figures, labels and stopping rules."""

import pytest
import torch

from torch_sap.records.metrics import as_metrics, choose_metric


@pytest.mark.parametrize(
    ("names", "shown", "largest", "smallest"),
    [
        ([], None, None, None),
        (["loss"], "loss", ValueError, "loss"),
        (["top1"], "top1", "top1", "top1"),
        (["accuracy"], "accuracy", "accuracy", "accuracy"),
        (["loss", "accuracy"], "accuracy", "accuracy", ValueError),
        (["top1", "top5"], "top1", ValueError, ValueError),
        (["Validation_Perplexity"], "Validation_Perplexity", ValueError, "Validation_Perplexity"),
    ],
)
def test_choice_of_the_metric(names, shown, largest, smallest):
    assert choose_metric(names) == shown
    for judge, expected in (("max", largest), ("min", smallest)):
        assert choose_metric(names, "named", judge=judge) == "named"
        if expected is ValueError:
            with pytest.raises(ValueError, match="metric must be named where it is not clear by what to judge"):
                choose_metric(names, judge=judge)
        else:
            assert choose_metric(names, judge=judge) == expected


def test_tensors_of_one_real_number_are_metrics():
    tensors = {"loss": torch.tensor(0.5, requires_grad=True), "accuracy": torch.tensor([0.25], dtype=torch.bfloat16)}
    assert as_metrics(tensors, "train_fn") == {"loss": 0.5, "accuracy": 0.25}
    for wrong in (torch.tensor(1j), torch.ones(2)):
        with pytest.raises(TypeError, match="train_fn must give None, a number or a mapping"):
            as_metrics(wrong, "train_fn")
