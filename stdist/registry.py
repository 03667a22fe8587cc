"""Named things of one kind that packages add to: recipes, readers, backbones."""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from stdist.errors import InputError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Maps names to things of one ``kind``: those that were registered, then those of installed packages, which name
    them in their entry points of ``group`` and are imported when one of theirs is asked for.

    Args:
        kind: what errors call one of them, as ``recipe``.
        group: entry-point group, as ``stdist.recipes``. A point names the thing itself, or what registers it when it
            is imported.
        package: a package every module of which registers what it defines when it is imported.
    """

    def __init__(self, kind: str, group: str, package: str | None = None):
        self.kind, self._group, self._package = kind, group, package
        self._things: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorates the thing called ``name``; ValueError where another is called so."""

        def add(thing: T) -> T:
            if self._things.setdefault(name, thing) is not thing:
                raise ValueError(f"two {self.kind}s are called {name!r}; rename one")
            return thing

        return add

    def _points(self) -> dict[str, EntryPoint]:
        """Entry points by name, after the package's own modules were imported. Raises InputError where two installed
        packages use one name."""
        if self._package:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__, f"{self._package}."):
                importlib.import_module(module.name)
        points: dict[str, EntryPoint] = {}
        for point in entry_points(group=self._group):
            if (other := points.setdefault(point.name, point)).value != point.value:
                raise InputError(
                    f"{self.kind} {point.name!r} is {other.value} and {point.value}; uninstall one of the packages"
                )
        return points

    def _load(self, point: EntryPoint) -> T:
        try:
            return point.load()
        except (ImportError, AttributeError) as error:
            raise InputError(
                f"{self.kind} {point.name!r} cannot be loaded from {point.value} ({error}); mend or remove its package"
            ) from error

    def __getitem__(self, name: str) -> T:
        """Raises InputError, naming the nearest known name, where there is none, or what cannot be loaded."""
        if name not in self._things:
            points = self._points()
            if name not in self._things and name in points:
                self._things.setdefault(name, self._load(points[name]))
        if name not in self._things:
            known = list(self)
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}"
            raise InputError(f"no {self.kind} {name!r}; {hint}")
        return self._things[name]

    def __contains__(self, name: object) -> bool:
        return name in self._things or name in self._points() or name in self._things

    def __iter__(self) -> Iterator[str]:
        points = self._points()
        return iter(sorted({*self._things, *points}))

    def __len__(self) -> int:
        return len(list(iter(self)))
