"""A run folder and the configuration it belongs to: whatever the recipe, another's folder is never written into."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from stdist.config import RunConfig, dump_config, validated
from stdist.errors import InputError, ResourceError, of_the_system
from stdist.files import require_writable, write_atomically

if TYPE_CHECKING:
    from stdist.training.process_group import ProcessGroup

CONFIG = "config.yaml"
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
    to it. An option that the folder's configuration did not have yet has its default."""
    run_dir = config.run_dir
    if (path := run_dir / CONFIG).exists():
        old, new = _with_defaults(yaml.safe_load(path.read_text()), config), yaml.safe_load(dump_config(config))
        for key in ("learners", "nodes", "output_dir"):
            if key in new:
                new[key] = old.get(key)
        if "rollouts" in new and old.get("rollouts"):
            new["rollouts"] = old["rollouts"] | {"max_staleness": new["rollouts"]["max_staleness"]}
        difference = _first_difference(old, new)
        if difference:
            raise InputError(f"{run_dir} belongs to another config ({difference}); choose another name= or delete it")
    noted = run_dir / STORE_DIGEST
    if noted.exists() and noted.read_text() != store_digest:
        then, now = noted.read_text()[:12], store_digest[:12]
        raise InputError(
            f"{run_dir} was trained on other data: {config.data.store} had digest {then}… then, {now}… now; "
            "choose another name= or delete it"
        )


def _with_defaults(old: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    try:
        return yaml.safe_load(dump_config(validated(old, type(config), where=CONFIG)))
    except InputError:  # of another recipe, or with options that are gone
        return old


def _first_difference(old: Any, new: Any, key: str = "") -> str | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in new:  # an option that only the old has is one that this version has not
            difference = _first_difference(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
            if difference:
                return difference
        return None
    return None if old == new else f"{key} is {old!r} there, {new!r} here"
