"""Nestings, snapshots, labels of a Teacher and exported files: cut off, changed, or made to do harm.

Checkpoints of runs belong here too, through `matta train --resume` and `matta.fit(resume=True)`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bad_cases import Case, Damage, cut, edit, flip, remove, unlisted, weights, write
from good_inputs import tower
from safetensors.numpy import save_file

import matta
from matta.lm.teacher_labels import StoredTeacher


def load(folder: Path) -> object:
    return matta.load(folder / "nesting", tower(4), tower(8))


def extract(folder: Path) -> object:
    return matta.extract_saved(folder / "nesting", folder / "made", tower(4), tower(8))


def snapshot(folder: Path) -> object:
    return matta.read_snapshot(folder / "snapshots", lambda: tower(4))


def labels(folder: Path) -> object:
    return StoredTeacher(folder / "labels").labels(torch.arange(3))


def onnx(folder: Path) -> object:
    return matta.OnnxModule(folder / "model.onnx")


def header(**entries: Any) -> bytes:
    return json.dumps(entries).encode()


def tensor(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _nesting(name: str, damage: Damage, line: str) -> Case:
    """Without checksums, so that what comes after them is tried; version 1 has a digest in their place."""
    return Case(name, unlisted("nesting", damage), extract, line)


def _labels(**arrays: np.ndarray) -> Damage:
    return lambda folder: save_file(arrays, folder / "labels" / "labels-00000.safetensors")


WEIGHTS, PLANS = "nesting/nested.safetensors", "nesting/nested.json"
VERSION = "snapshots/00000001"
SHARD = "labels/labels-00000.safetensors"
CASES = [
    Case("nesting gone", remove(PLANS), load, r"nested.json cannot be read"),
    Case(
        "nesting is a file",
        write("nesting2", ""),
        lambda w: matta.load(w / "nesting2", tower(4), tower(8)),
        r"holds no saved nesting",
    ),
    Case("nesting flipped", flip(WEIGHTS), load, r"nested.safetensors is damaged: its checksum"),
    Case("plans flipped", flip(PLANS), load, r"nested.json is damaged: its checksum"),
    Case("checksums flipped", flip("nesting/CRC32SUMS", 0.1), load, r"is damaged|cannot be read"),
    Case("checksums are no text", write("nesting/CRC32SUMS", b"\xff\xfe"), load, r"CRC32SUMS is damaged"),
    Case("checksums without names", write("nesting/CRC32SUMS", "abc\n"), load, r"CRC32SUMS is damaged"),
    Case(
        "checksums of another folder",
        write("nesting/CRC32SUMS", "0" * 64 + "  ../recipe.toml\n"),
        load,
        r"CRC32SUMS is damaged",
    ),
    Case("other modules", write("x", ""), lambda w: matta.load(w / "nesting", tower(3), tower(8)), r"does not fit"),
    _nesting("plans cut off", cut(PLANS), r"nested.json is damaged"),
    _nesting("plans are a list", write(PLANS, "[]"), r"was not written by matta.save"),
    _nesting("plans are deep", write(PLANS, '{"a":' * 100_000), r"nested.json is damaged"),
    _nesting("plans are not UTF-8", write(PLANS, b"\xff"), r"nested.json is damaged"),
    _nesting("plans of a later version", edit(PLANS, version=99), r"was saved in version 99"),
    _nesting("plans without students", edit(PLANS, students=[]), r"damaged|expected"),
    _nesting("plans with a word", edit(PLANS, students="all"), r"damaged"),
    _nesting(
        "plans with numbers",
        edit(PLANS, students=[{"placements": [[1, 2, 3]], "private": [], "layers": []}]),
        r"damaged|does not fit",
    ),
    _nesting(
        "plans beyond the TA",
        edit(
            PLANS,
            students=[
                {"placements": [["0.weight", "9.weight", [[[[4], [8]]], [[[3], [3]]]]]], "private": [], "layers": []}
            ],
        ),
        r"does not fit|damaged",
    ),
    _nesting(
        "axes beyond the TA",
        edit(
            PLANS,
            students=[
                {"placements": [["0.weight", "0.weight", [[[[-4], [8]]], [[[3], [3]]]]]], "private": [], "layers": []}
            ],
        ),
        r"does not fit|damaged",
    ),
    _nesting("weights empty", write(WEIGHTS, b""), r"nested.safetensors cannot be read"),
    _nesting("weights of seven bytes", write(WEIGHTS, b"1234567"), r"cannot be read"),
    _nesting("weights are text", write(WEIGHTS, b"weights " * 99), r"cannot be read"),
    _nesting("weights are a pickle", write(WEIGHTS, b"\x80\x04cposix\nsystem\n"), r"cannot be read"),
    _nesting("header of an exabyte", weights(WEIGHTS, b"{}", 1 << 60), r"cannot be read"),
    _nesting("header of a gigabyte", weights(WEIGHTS, b"{}", 1 << 30), r"cannot be read"),
    _nesting("header is no JSON", weights(WEIGHTS, b"{'a'}   "), r"cannot be read"),
    _nesting("header is a list", weights(WEIGHTS, b"[1, 2]  "), r"cannot be read"),
    _nesting("header is deep", weights(WEIGHTS, b'{"a":' * 9999), r"cannot be read"),
    _nesting(
        "tensor beyond the file", weights(WEIGHTS, header(a=tensor("F32", [1 << 40], 0, 1 << 42))), r"cannot be read"
    ),
    _nesting("tensor before the file", weights(WEIGHTS, header(a=tensor("F32", [1], -4, 0))), r"cannot be read"),
    _nesting(
        "tensors over each other",
        weights(WEIGHTS, header(a=tensor("F32", [2], 0, 8), b=tensor("F32", [2], 4, 12)), data=bytes(12)),
        r"cannot be read",
    ),
    _nesting(
        "tensor of another size", weights(WEIGHTS, header(a=tensor("F32", [3], 0, 8)), data=bytes(8)), r"cannot be read"
    ),
    _nesting(
        "tensor of an unknown type",
        weights(WEIGHTS, header(a=tensor("F9", [2], 0, 8)), data=bytes(8)),
        r"cannot be read",
    ),
    _nesting(
        "tensor of a type of its own",
        weights(WEIGHTS, header(a=tensor("F8_E8M0", [8], 0, 8)), data=bytes(8)),
        r"F8_E8M0",
    ),
    _nesting(
        "tensor of another name", weights(WEIGHTS, header(a=tensor("F32", [2], 0, 8)), data=bytes(8)), r"is only in"
    ),
    _nesting("no tensor", weights(WEIGHTS, b"{}      "), r"is only in the modules"),
    Case("weights cut off", unlisted("nesting", cut(WEIGHTS)), load, r"is damaged"),
    # --- snapshots
    Case("snapshot flipped", flip(f"{VERSION}/student.safetensors"), snapshot, r"student.safetensors is damaged"),
    Case(
        "snapshot cut off", unlisted(VERSION, cut(f"{VERSION}/student.safetensors")), snapshot, r"student.safetensors"
    ),
    Case(
        "snapshot without weights",
        unlisted(VERSION, remove(f"{VERSION}/student.safetensors")),
        snapshot,
        r"has no model 'student'",
    ),
    Case(
        "snapshot without a description",
        unlisted(VERSION, remove(f"{VERSION}/snapshot.json")),
        snapshot,
        r"is not whole",
    ),
    Case(
        "description is a list",
        unlisted(VERSION, write(f"{VERSION}/snapshot.json", "[]")),
        snapshot,
        r"snapshot.json is damaged",
    ),
    Case(
        "description is not UTF-8",
        unlisted(VERSION, write(f"{VERSION}/snapshot.json", b"\xff")),
        snapshot,
        r"snapshot.json is damaged",
    ),
    Case(
        "description without a time",
        unlisted(VERSION, edit(f"{VERSION}/snapshot.json", time_s=None)),
        snapshot,
        r"snapshot.json is damaged",
    ),
    Case(
        "encoder is no JSON",
        unlisted(VERSION, write(f"{VERSION}/encoder.json", "{")),
        snapshot,
        r"encoder.json is damaged",
    ),
    Case(
        "encoder is not UTF-8",
        unlisted(VERSION, write(f"{VERSION}/encoder.json", b"\xff")),
        snapshot,
        r"encoder.json is damaged",
    ),
    Case("latest is gone", remove("snapshots/latest"), snapshot, r"holds no snapshot"),
    Case("latest leads out", write("snapshots/latest", "../nesting"), snapshot, r"latest"),
    Case("latest is absolute", write("snapshots/latest", "/etc"), snapshot, r"latest"),
    Case("latest is no text", write("snapshots/latest", b"\xff\x00"), snapshot, r"latest"),
    Case("latest is of no version", write("snapshots/latest", "00000009"), snapshot, r"00000009 is not whole"),
    Case(
        "snapshot for another module",
        write("x", ""),
        lambda w: matta.read_snapshot(w / "snapshots", lambda: tower(5)),
        r"does not fit the module",
    ),
    Case(
        "snapshot of a name that leads out",
        write("x", ""),
        lambda w: matta.read_snapshot(w / "snapshots", lambda: tower(4), model="../../nesting/nested"),
        r"has no model",
    ),
    Case(
        "snapshot that is not there",
        write("x", ""),
        lambda w: matta.read_snapshot(w / "snapshots", lambda: tower(4), version=9),
        r"has no version 9; it has: 1",
    ),
    Case(
        "snapshots to be served",
        write("snapshots/latest", b"\xff"),
        lambda w: matta.read_snapshot(w / "none", lambda: tower(4)),
        r"holds no snapshot",
    ),
    # --- labels
    Case("labels gone", remove("labels/teacher.json"), labels, r"holds no labels: there is no teacher.json"),
    Case("labels flipped", flip("labels/teacher.json"), labels, r"teacher.json is damaged"),
    Case("shard gone", remove(SHARD), labels, r"labels-00000.safetensors is missing, of 2 files"),
    Case("shard cut off", cut(SHARD), labels, r"labels-00000.safetensors is damaged"),
    Case("shard flipped", flip(SHARD, 0.99), labels, r"labels-00000.safetensors is damaged"),
    Case("shard of another form", _labels(samples=np.arange(2)), labels, r"labels-00000.safetensors is damaged"),
    Case(
        "shard of other shapes",
        _labels(samples=np.arange(2), tokens=np.ones((2, 3, 1)), log_probs=np.ones((2, 3, 1)), checks=np.ones(2)),
        labels,
        r"and teacher.json says",
    ),
    Case(
        "shard of other types",
        _labels(samples=np.ones(2), tokens=np.ones((2, 3, 2)), log_probs=np.ones((2, 3, 2)), checks=np.full(2, np.nan)),
        labels,
        r"labels-00000.safetensors",
    ),
    Case(
        "labels are a list", unlisted("labels", write("labels/teacher.json", "[]")), labels, r"teacher.json is damaged"
    ),
    Case(
        "labels with a key more",
        unlisted("labels", edit("labels/teacher.json", more=1)),
        labels,
        r"teacher.json is damaged",
    ),
    Case(
        "labels of no samples",
        unlisted("labels", edit("labels/teacher.json", num_samples=0)),
        labels,
        r"teacher.json is damaged",
    ),
    Case(
        "labels in no shards",
        unlisted("labels", edit("labels/teacher.json", samples_per_shard=0)),
        labels,
        r"teacher.json is damaged",
    ),
    Case(
        "labels of too many samples",
        unlisted("labels", edit("labels/teacher.json", num_samples=1 << 60)),
        labels,
        r"is missing, of|teacher.json",
    ),
    Case(
        "labels of text",
        unlisted("labels", edit("labels/teacher.json", num_samples="many")),
        labels,
        r"teacher.json is damaged",
    ),
    # --- exported files
    Case("no ONNX", write("model.onnx", b"\x08\x07" + b"\xff" * 99), onnx, r"model.onnx"),
    Case("ONNX gone", write("x", ""), onnx, r"model.onnx"),
    Case("ONNX empty", write("model.onnx", b""), onnx, r"model.onnx"),
]
