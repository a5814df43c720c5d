"""Use an installed torch_sap outside of its checkout: prune a model, write a file, and scan it from the command line.

cd ELSEWHERE && PYTHONPATH=INSTALLED python CHECKOUT/.ci/smoke.py INSTALLED
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import torch_sap
from torch_sap.stopping import TargetDensity

installed = Path(sys.argv[1]).resolve()
assert Path(torch_sap.__file__).is_relative_to(installed), torch_sap.__file__
assert (installed / "torch_sap" / "py.typed").exists()
assert all(hasattr(torch_sap, name) for name in torch_sap.__all__)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
history = torch_sap.iterative_sap(model, lambda model: None, stop=TargetDensity(0.8))
assert history[-1].density <= 0.8
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "model.pt"
    torch.save(torch_sap.dense_state_dict(model), path)
    command = [installed / "bin" / "torch-sap", "scan", path]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
assert "0.weight" in told, told
print(told)
