"""Events in time order, from files that arrive while training runs: what `matta.fit` trains on online.

A `Schema` declares the columns of an event, a source gives them (`Folder`, `Rows`), and a `Stream` makes
checked batches of them. Rows and files that do not fit are set aside in a quarantine file, with the reason.
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
