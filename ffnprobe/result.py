"""What an analyzer says: a table of typed rows that knows its units, its settings and how to draw itself."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from scipy.stats import binomtest

from .disk import atomic_write
from .errors import InputError

FEWEST_LAYERS = 5  # of fewer, no test at 5% can say anything, and no verdict is given


def column(unit: str, meaning: str) -> Any:
    """A field of a Row with its unit and its meaning; both travel in the saved table's schema."""
    return field(metadata={"unit": unit, "meaning": meaning})


def beyond(k: int, n: int, share: float = 0.5) -> bool:
    """Are k of n more than this share, beyond chance? One-sided binomial test at 5%.

    >>> beyond(16, 30), beyond(20, 30), beyond(5, 5)
    (False, True, True)
    """
    return bool(binomtest(k, n, share, alternative="greater").pvalue < 0.05)


@dataclass(frozen=True)
class Verdict:
    """What the numbers say of one of the six claims, by a rule that was fixed before they were seen."""

    claim: int
    rule: str
    measured: str
    verdict: Literal["supported", "mixed", "not supported"]
    against: str  # the strongest published evidence against the claim


@dataclass(frozen=True)
class Result:
    """A table, the settings that made it, and its reading. An analyzer subclasses it beside its Row."""

    rows: Sequence[Any]
    settings: Mapping[str, Any]

    name: ClassVar[str]
    question: ClassVar[str]
    row_type: ClassVar[type]
    table: ClassVar[str | None] = None  # what its file is called in a run; as the analyzer, if None

    @classmethod
    def path(cls, folder: str | Path) -> Path:
        """Of the table in the folder of a run's tables."""
        return Path(folder) / f"{cls.table or cls.name}.parquet"

    def to_frame(self) -> pd.DataFrame:
        """One line a row, one column a field."""
        columns = {f.name: [getattr(row, f.name) for row in self.rows] for f in fields(self.row_type)}
        frame = pd.DataFrame(columns)
        # pandas makes floats of integers with a gap
        return frame.astype({f.name: "Int64" for f in fields(self.row_type) if f.type == "int | None"})

    def save(self, path: str | Path) -> Path:
        """Write the table as parquet; units and meanings go into the schema, settings into its metadata."""
        table = pa.Table.from_pandas(self.to_frame(), preserve_index=False)
        for i, f in enumerate(fields(self.row_type)):
            table = table.set_column(i, table.schema.field(i).with_metadata(dict(f.metadata)), table.column(i))
        about = {"result": self.name, "question": self.question, "settings": json.dumps(dict(self.settings))}
        return atomic_write(path, lambda file: pq.write_table(table.replace_schema_metadata(about), file))

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Read what `save` wrote.

        Raises:
            InputError: the file is another analyzer's table, or no table of ours.
        """
        table = pq.read_table(path)
        about = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        if about.get("result") != cls.name:
            found = about.get("result", "no result")
            raise InputError(f"{path} holds {found!r}, not {cls.name!r}: give {cls.name}.parquet")
        # parquet has one word for a gap and for what is not a number
        nan = {f.name: math.nan for f in fields(cls.row_type) if f.type == "float"}
        lines = ({**line, **{name: nan[name] for name in nan if line[name] is None}} for line in table.to_pylist())
        rows = tuple(cls.row_type(**line) for line in lines)
        return cls(rows=rows, settings=json.loads(about["settings"]))

    def findings(self) -> list[str]:
        """The telling numbers, one sentence each, the most telling first; each stands beside its null."""
        raise NotImplementedError

    def verdicts(self) -> list[Verdict]:
        """What the table says of the six claims; empty where it says nothing."""
        return []

    def plot(self) -> Figure:
        """The figure of the table; axes carry name and unit, the caption model, tokens and seed."""
        raise NotImplementedError
