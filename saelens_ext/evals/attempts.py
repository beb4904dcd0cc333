"""Computing cell by cell, so that what fails is recorded and nothing else is lost."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from saelens_ext.evals.evidence import Failure
from saelens_ext.evals.methods import Method
from saelens_ext.host.models import HostModel, resolve_hook

logger = logging.getLogger(__name__)


@dataclass
class Attempts:
    """The cells of an evaluation in the making, and what failed."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    @contextmanager
    def of(self, method: str, unit: str) -> Iterator[None]:
        """Record an error of a method on a unit instead of raising it; an empty name stands for all of them."""
        try:
            yield
        except Exception as error:  # whatever a user's method or a host library raises
            self.failed(method, unit, f"{type(error).__name__}: {error}")

    def failed(self, method: str, unit: str, error: str) -> None:
        """Record an error of a method on a unit."""
        self.failures.append(Failure(method, unit, error))
        logger.warning("%s", self.failures[-1])

    def packed(self) -> dict[str, Any]:
        """The rows and the failures in lists, as :meth:`add` takes them."""
        return {"rows": self.rows, "failures": [list(failure) for failure in self.failures]}

    def add(self, packed: Mapping[str, Any]) -> None:
        """Take over what another has packed; a value that JSON had no number for is NaN."""
        self.rows += [row | {"value": np.nan} if row["value"] is None else row for row in packed["rows"]]
        self.failures += [Failure(*failure) for failure in packed["failures"]]

    def usable(self, model: HostModel, methods: Sequence[Method]) -> list[Method]:
        """The methods whose hook the model has."""
        found = []
        for method in methods:
            with self.of(method.name, ""):
                resolve_hook(model, method.detector.hook_name)
                found.append(method)
        return found

    def cells(self, columns: Sequence[str], **defaults: Any) -> pd.DataFrame:
        """The rows as a table.

        Raises:
            ValueError: nothing could be computed.
        """
        if not self.rows:
            raise ValueError(f"Nothing could be computed. {'; '.join(map(str, self.failures[:3]))}")
        return pd.DataFrame([defaults | row for row in self.rows], columns=list(columns))

    def summary(self, n_units: int) -> tuple[Failure, ...]:
        """The failures; a method that failed on every unit is named once, with its first error."""
        units = {
            name: {failure.unit for failure in self.failures if failure.method == name and failure.unit}
            for name in {failure.method for failure in self.failures}
        }
        merged = dict[tuple[str, str], Failure]()
        for failure in self.failures:
            everywhere = failure.method and len(units[failure.method]) >= n_units > 1
            unit = "" if everywhere else failure.unit
            merged.setdefault((failure.method, unit), failure._replace(unit=unit))
        return tuple(merged.values())
