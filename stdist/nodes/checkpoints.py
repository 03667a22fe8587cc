"""A forecaster of nodes in a checkpoint: its own files, and which data it was fitted on."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from stdist.data.audit import Fitted
from stdist.files import write_atomically
from stdist.nodes.interface import Forecaster
from stdist.training.checkpoint import damage_as_one_line

FITTED = "fitted.json"


@dataclass(frozen=True)
class ForecasterFiles:
    """See :class:`stdist.training.loop.Model`. ``fitted`` is kept beside the weights."""

    model: Forecaster
    fitted: tuple[Fitted, ...]

    def snapshot(self) -> Callable[[Path], None]:
        save = self.model.snapshot()

        def write(folder: Path) -> None:
            save(folder)
            write_atomically(folder / FITTED, json.dumps([asdict(fit) for fit in self.fitted], indent=1))

        return write

    def read(self, path: Path) -> None:
        self.model.read(path)


def load_fitted(folder: Path) -> tuple[Fitted, ...] | None:
    """Everything fitted of the forecaster in ``folder``, and on which data; None where nobody noted it."""
    path = folder / FITTED
    if not path.exists():
        return None
    with damage_as_one_line(folder):
        return tuple(Fitted(**fit) for fit in json.loads(path.read_text()))


def digest_of(model: nn.Module, names: Iterable[str]) -> str:
    """One sha256 over the bytes of these parameters."""
    parameters, digest = dict(model.named_parameters()), hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode())
        digest.update(parameters[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
