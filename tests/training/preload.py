"""What children find done when they are forked: the imports, and what transformers computes once in a process."""

import gc
import tempfile
from pathlib import Path

import matplotlib.pyplot  # noqa: F401
import tensorboard.summary.writer.event_file_writer  # noqa: F401
import torch

import llama_smop.training.run  # noqa: F401
from llama_smop.models import model_folder
from llama_smop.models.tiny import build_tiny

torch.set_num_threads(1)  # threads do not survive a fork
with tempfile.TemporaryDirectory() as folder:
    model_folder.save(*build_tiny(["word"], width=16, hidden_features=16), Path(folder) / "model")
gc.collect()
gc.freeze()  # else each child's collector walks through all that was imported
