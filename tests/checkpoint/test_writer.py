"""The writer knows where each chunk lies, whatever torch's does with the metadata it is given."""

from __future__ import annotations

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from moe.checkpoint.writer import Writer


def test_places_are_known_where_torch_completes_a_copy_of_the_metadata_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(FileSystemWriter, "finish", lambda self, metadata, results: None)  # as torch 2.11
    writer, (a, b) = Writer(tmp_path, 1), (MetadataIndex("a"), MetadataIndex("b"))
    writer.finish(Metadata({}), [[WriteResult(a, 4, "first")], [], [WriteResult(b, 4, "second")]])
    assert writer.metadata is not None
    assert writer.metadata.storage_data == {a: "first", b: "second"}
