"""Events in time order, from files that arrive while training runs: what `matta.fit` trains on online.

A `Schema` declares the columns of an event, a source gives them (`Folder`, `Rows`), and a `Stream` makes
checked batches of them. Rows and files that do not fit are set aside in a quarantine file, with the reason.

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
from matta.streams.folder import Folder
from matta.streams.rows import Rows
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
