"""What holds for every test: one thread, no network, Ctrl-C heard, shapes checked, generated cases repeatable."""

import importlib.util
import os
import signal
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp())  # the code that folders of models bring is copied there

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell has it for what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis

import shape_checks

_package = importlib.util.find_spec("matta")
assert _package is not None
assert _package.origin is not None
shape_checks.install(Path(_package.origin).parent)

hypothesis.settings.register_profile("tests", max_examples=25, deadline=None, derandomize=True)
hypothesis.settings.register_profile("stress", max_examples=2000, deadline=None)
hypothesis.settings.load_profile("tests")
