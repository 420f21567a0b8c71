"""Serving: the sizes of a nesting behind an HTTP server, by the Open Inference Protocol.

Read in this order:

- `serve_settings`: what can be set. `serving_command`: `matta.serve`, and what `matta serve` finds to serve.
- `inference_protocol`: requests to tensors, and tensors to answers.
- `served_models`: modules for all sizes over one copy of the weights; new versions from a folder of snapshots.
- `batch_independence`: whether the answer to a row is its own.
- `size_policy`: which size answers, so that a latency target holds.
- `batching`: requests that wait together are computed together.
- `application`: the addresses. `serving_metrics`: what Prometheus reads. `http_server`: the process, and its end.

This file loads the settings alone, so that the command line answers without torch.
"""

from matta.serving.serve_settings import ServeSettings

__all__ = ["ServeSettings"]
