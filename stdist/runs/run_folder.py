"""A run folder and the configuration it belongs to: whatever the recipe, another's folder is never written into."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from stdist.config import RunConfig, dump_config, read_tree, validated
from stdist.config.yaml_core import load_yaml
from stdist.errors import DamageError, InputError, ResourceError, of_the_system
from stdist.files import own_file, require_working_folder, require_writable, write_atomically
from stdist.locks import WriterLock

if TYPE_CHECKING:
    from stdist.training.process_group import ProcessGroup

CONFIG = "config.yaml"
LOCK = "lock"
T = TypeVar("T")
STORE_DIGEST = "store_digest"  # the data it was trained on, which the same path may not hold for ever


def open_together(group: "ProcessGroup", open_input: Callable[[], T]) -> T:
    """Calls ``open_input`` on every learner. Raises on all what it raises on one, InputError, ResourceError or in their
    place what the system says: nothing is written before all learners know that the input is good."""
    opened: list[T] = []
    problem: InputError | ResourceError | None = None
    try:
        opened.append(open_input())
    except (InputError, ResourceError) as error:
        problem = error
    except (OSError, MemoryError) as error:
        problem = of_the_system(error)
        assert problem is not None
    if problems := [each for each in group.all_gather_object(problem) if each]:
        raise problems[0]
    return opened[0]


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Holds a run folder for this process and what it starts, whoever trains: no other command writes into it.

    Makes the folder; where nothing was written in it, it is gone again afterwards. Raises InputError where another
    process holds it, and where it is no run's: a training must not write over what somebody else keeps there.
    """
    require_writable(run_dir)
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    require_working_folder(run_dir.resolve(), is_ours=(run_dir / CONFIG).is_file() or (run_dir / LOCK).is_file())
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with WriterLock(run_dir / LOCK, run_dir):
            yield
    finally:
        for folder in made:
            with suppress(OSError):  # not empty
                folder.rmdir()
        if run_dir.is_dir() and not (run_dir / CONFIG).exists() and any(run_dir.iterdir()):
            (run_dir / LOCK).touch()  # stopped before it was a run, and ours all the same


def require_writable_run(run_dir: Path) -> None:
    """Raises what ``require_writable`` does where a run cannot write into its folder, new or of a run before."""
    below = (path for pattern in ("*", "*/*") for path in run_dir.glob(pattern) if path.is_dir())
    for folder in (run_dir, *(path for path in below if ".zarr" not in "".join(path.suffixes))):
        require_writable(folder)
    for log in run_dir.glob("*.jsonl"):  # the only files that are not replaced as a whole
        log.open("a").close()


def begin_run_folder(config: RunConfig, store_digest: str) -> None:
    """Makes the folder and notes in it what it belongs to."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(config.run_dir / STORE_DIGEST, store_digest)
    write_atomically(config.run_dir / CONFIG, dump_config(config))


def refuse_foreign_folder(config: RunConfig, store_digest: str) -> None:
    """Raises InputError where the folder belongs to another configuration, naming a difference, or to other data.

    On how many learners it is trained and who samples for them may change, since the batches do not; and so may the way
    to it and to what it reads. An option that the folder's configuration did not have yet has its default."""
    run_dir = config.run_dir
    noted = noted_digest(run_dir)
    if (run_dir / CONFIG).exists():
        old, new = _with_defaults(read_own_config(run_dir), config), load_yaml(dump_config(config))
        if noted == store_digest:  # by whatever path the data is reached
            old.setdefault("data", {})["store"] = new["data"]["store"]
        for key in ("learners", "nodes", "output_dir"):
            if key in new:
                new[key] = old.get(key)
        if "rollouts" in new and old.get("rollouts"):
            new["rollouts"] = old["rollouts"] | {"max_staleness": new["rollouts"]["max_staleness"]}
        difference = _first_difference(old, new)
        if difference:
            raise InputError(
                f"{run_dir} belongs to another config ({difference}); choose another name=, or set it back to go on"
            )
    if noted not in (None, store_digest):
        raise InputError(
            f"{run_dir} was trained on other data, of digest {noted[:12]}…, and {config.data.store} has "
            f"{store_digest[:12]}…; choose another name=, or give the store it was trained on"
        )


def noted_digest(run_dir: Path) -> str | None:
    """The digest of the data that a run was trained on; None where no run has begun. Raises DamageError."""
    path = run_dir / STORE_DIGEST
    if not path.exists():
        return None
    with own_file(path, "write the digest of the run's store into it, which `stdist check --json` says"):
        digest = path.read_text().strip()
        if len(digest) != 64:
            raise ValueError(f"{len(digest)} characters instead of a SHA-256")
        int(digest, 16)
        return digest


def read_own_config(run_dir: Path) -> dict[str, Any]:
    """The tree of the configuration that a run noted. Raises DamageError where it is none any more."""
    try:
        return read_tree(run_dir / CONFIG)
    except InputError as error:
        raise DamageError(f"{error}; it is the run's own, `stdist train` writes it again where it is deleted") from None


def _with_defaults(old: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    try:
        return load_yaml(dump_config(validated(old, type(config), where=CONFIG)))
    except InputError:  # of another recipe, or with options that are gone
        return old


def _first_difference(old: Any, new: Any, key: str = "") -> str | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in new:  # an option that only the old has is one that this version has not
            difference = _first_difference(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
            if difference:
                return difference
        return None
    return None if old == new or _same_path(old, new) else f"{key} is {old!r} there, {new!r} here"


def _same_path(old: Any, new: Any) -> bool:
    absolute = all(isinstance(path, str) and os.path.isabs(path) for path in (old, new))
    return absolute and os.path.realpath(old) == os.path.realpath(new)
