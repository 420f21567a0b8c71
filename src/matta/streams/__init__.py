"""Events in time order, from files that arrive while training runs: what `matta.fit` trains on online.

A `Schema` declares the columns of an event, a source gives them (`Folder`, `Rows`), and a `Stream` makes
checked batches of them. Rows and files that do not fit are set aside in a quarantine file, with the reason.

Read in this order:

- `schema`: the columns of an event. `chunks`: rows as columns, where they came from, and the quarantine of bad ones.
- `folder_source`, `row_source`: events from a folder that grows, or from an iterator. `parsing`: CSV and JSONL.
- `row_checks`: what does not fit the schema.
- `encoding`: from columns to tensors.
- `stream`: batches of these, and the place at which a run resumes.

Example:
    >>> import tempfile
    >>> from matta.streams import Numeric, Rows, Schema, Stream
    >>> schema = Schema(columns={"x": Numeric()}, label="late")
    >>> events = Rows([{"x": 1.5, "late": 0}, {"x": 2.5, "late": 1}])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     [len(batch["labels"]) for batch in Stream(events, schema, batch_size=2, quarantine=f"{folder}/bad.jsonl")]
    [2]
"""

from matta.errors import RunError

try:
    import pyarrow as _pyarrow  # noqa: F401
except ModuleNotFoundError:
    raise RunError("matta.streams needs pyarrow, which is not installed; pip install 'matta[stream]'") from None

from matta.streams.chunks import Bad, Chunk
from matta.streams.encoding import Encoder, EventBatch
from matta.streams.folder_source import Folder
from matta.streams.row_source import Rows
from matta.streams.schema import Categorical, Numeric, Schema
from matta.streams.stream import Counts, Stream

__all__ = [
    "Bad",
    "Categorical",
    "Chunk",
    "Counts",
    "Encoder",
    "EventBatch",
    "Folder",
    "Numeric",
    "Rows",
    "Schema",
    "Stream",
]
