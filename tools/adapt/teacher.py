"""What the dense model makes of each window, computed once and kept in files."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from prunewright.state.run import DENSE
from prunewright.tools.adapt.checkpoints import read_tensors
from prunewright.tools.bench.workbench import Workbench
from prunewright.tools.model.head import Progress
from prunewright.tools.store.storage import appearing


class Teacher:
    """Last hidden states of the dense model, a file a window; logits are made of them in pieces."""

    def __init__(self, bench: Workbench, folder: Path, progress: Progress | None = None) -> None:
        """Compute what is not there yet; a kill in the midst loses one window.

        Args:
            bench: the model and its calibration windows; left at the dense revision, if anything
                was computed.
            folder: where the files are.
            progress: told of each part.

        Raises:
            StoreError: a file cannot be written.
        """
        self._folder, execution = folder, bench.loaded.execution
        windows = bench.windows.calibration
        missing = [index for index in range(len(windows)) if not self._file(index).exists()]
        if not missing:
            return
        bench.sync(DENSE)
        left = iter(missing)
        for ids in execution.groups("the dense model's outputs", windows[missing], progress):
            with torch.no_grad():
                states = execution.hidden_states(ids).cpu()
            # In this order: what runs out first must not have taken one of the other.
            for one, index in zip(states.unbind(), left, strict=False):
                with appearing(self._file(index)) as scratch:
                    save_file({"states": one.contiguous()}, scratch)
        bench.tokens["calibration"] += windows[missing].numel()

    def states(self, window: int) -> Tensor:
        """Hidden states [length, width] of a window, on the processor.

        Raises:
            StoreError: missing or damaged.
        """
        return read_tensors(self._file(window))["states"]

    def _file(self, window: int) -> Path:
        return self._folder / f"{window:06d}.safetensors"
