"""A training by the Trainer.

python killed_trainer.py FOLDER STEP               that kills itself after a step
python killed_trainer.py FOLDER 0 [CHECKPOINT]     that goes to its end, from a checkpoint if one is named
"""

import os
import signal
import sys

import torch
import transformers
from language_models import trainer

from torch_sap.integrations.transformers import SAPCallback


class Kill(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **given):
        if state.global_step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)  # as in the tests: sums of several threads are rounded differently
    callbacks = [SAPCallback(2, p=1.0, q=2.0, beta=0.5), Kill()]
    training = trainer(sys.argv[1], callbacks, save_strategy="steps", save_steps=3)
    training.train(resume_from_checkpoint=sys.argv[3] if len(sys.argv) > 3 else None)
