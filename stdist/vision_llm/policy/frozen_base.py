"""Digests of a base, which tell whether it is still the one that a checkpoint was trained on: of a frozen one the
checkpoint holds no weights."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers.utils import cached_file

from stdist.data.integrity import sha256_of
from stdist.errors import DamageError

Digests = tuple[tuple[str, str], ...]
"""SHA-256 of files, by name."""


def base_digests(base: str) -> Digests:
    """The SHA-256 of each file of weights of ``base``, a folder or a hub name that has been loaded, and of its
    configuration. A file a thread: at 1.2 GB/s a core, the five files of a 7B take three seconds."""
    folder = Path(str(cached_file(base, "config.json"))).parent
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    with ThreadPoolExecutor() as threads:
        return tuple(zip((file.name for file in files), threads.map(sha256_of, files), strict=True))


def require_same_base(base: str, found: Digests, recorded: Digests, checkpoint: Path) -> None:
    """Raises DamageError where ``base`` is not as it was when ``checkpoint`` was saved."""
    if recorded and (other := set(found) ^ set(recorded)):  # a version that noted none compares none
        raise DamageError(
            f"policy.base {base} is not as it was when {checkpoint} was trained on it: {min(other)[0]} differs; copy "
            "the base again, or train another run on this one"
        )
