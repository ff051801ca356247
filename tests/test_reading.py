"""Where an expert lies on the disk is read from the headers, never assumed; and its pieces are its bytes."""

import json

import pytest
import torch
from small import random_model, small_config

from k2 import reading
from k2.ceilings import aligned_bytes
from k2.checkpoint import Checkpoint, save
from k2.reading import PIECE, Shards, Span, data_start, expert_record, pieces, tensor_at

KEY = (1, 3)


@pytest.fixture(scope="module", params=["bf16", "fp8", "int4"])
def opened(request, tmp_path_factory):
    """A checkpoint in each format."""
    directory = tmp_path_factory.mktemp(request.param) / "model"
    save(random_model(small_config(hidden_size=64, moe_intermediate_size=32)), directory, format=request.param, shards=2)
    return Checkpoint(directory)


def read_expert(opened, readers: int = 2):
    """The record, and the tensors that its spans bring in, by part and kind."""
    starts = {file: data_start(opened.directory / file) for file in opened.headers}
    record = expert_record(opened, starts, KEY)
    shards = Shards(opened.directory, {span.file for span in record.spans}, readers)
    room = aligned_bytes(record.size)
    read = sum(part.result() for part in shards.start(record, room))
    shards.close()
    assert read <= record.size
    return record, {of: tensor_at(torch.frombuffer(room, dtype=torch.uint8), place) for of, place in record.places.items()}


def test_what_is_read_is_what_the_map_shows(opened):
    _, found = read_expert(opened)
    assert {kind for _, kind in found} == {"plain": {"weight"}, "fp8": {"weight"}, "int4": {"weight_packed", "weight_scale"}}[opened.config.weight_format]
    for (part, kind), tensor in found.items():
        mapped = opened.tensor(f"model.layers.1.mlp.experts.3.{part}.{kind}")
        assert tensor.dtype == mapped.dtype and torch.equal(tensor.view(torch.uint8), mapped.view(torch.uint8)), f"{part}.{kind}"


def test_neighbours_are_one_read_and_strangers_are_several(opened, tmp_path):
    record, found = read_expert(opened)
    assert len(record.spans) == (2 if opened.config.weight_format == "int4" else 1)
    moved = tmp_path / "moved"
    moved.mkdir()
    scatter(opened, moved)
    scattered, again = read_expert(Checkpoint(moved))
    assert len({span.file for span in scattered.spans}) == 2, "the down_proj lies in another shard now"
    assert all(torch.equal(again[of].view(torch.uint8), tensor.view(torch.uint8)) for of, tensor in found.items())


def scatter(opened, folder):
    """The same checkpoint with every down_proj of an expert in a shard of its own."""
    from safetensors.torch import save_file

    index, shards = {}, {}
    for name in opened.weight_map:
        file = "b.safetensors" if ".experts." in name and "down_proj" in name else "a.safetensors"
        index[name] = file
        shards.setdefault(file, {})[name] = opened.tensor(name).clone()
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_bytes((opened.directory / "config.json").read_bytes())


def test_pieces_cover_a_span_once_and_in_order():
    span = Span("file", 8192, 8192 + 2 * PIECE + 4096, 4096)
    parts = pieces(span)
    assert [p.begin for p in parts] == [8192, 8192 + PIECE, 8192 + 2 * PIECE] and parts[-1].end == span.end
    assert all(a.end == b.begin for a, b in zip(parts, parts[1:])) and [p.offset - span.offset for p in parts] == [0, PIECE, 2 * PIECE]


def test_a_span_read_in_small_pieces_by_many_readers_is_the_same(opened, monkeypatch):
    _, whole = read_expert(opened, readers=1)
    monkeypatch.setattr(reading, "PIECE", 4096)
    _, parts = read_expert(opened, readers=5)
    assert all(torch.equal(parts[of].view(torch.uint8), tensor.view(torch.uint8)) for of, tensor in whole.items())
