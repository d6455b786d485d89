from __future__ import annotations

import json

import numpy as np
import pytest

from moe.data.corpus import open_corpus, prepare
from moe.data.prepare import tokenize
from moe.data.sources import Stdlib
from moe.errors import DataError
from tests.data.makers import Given, byte_level

WORDS = [f"document number {n} says {'é' * (n % 7)}." for n in range(200)]


def texts_of(corpus, stream):
    ids = stream.read(0, len(stream)).ids
    return [corpus.tokenizer.decode(part) for part in np.split(ids, np.flatnonzero(ids == corpus.tokenizer.end) + 1)[:-1]]


def test_the_split_is_by_document_and_loses_none(tmp_path):
    corpus = prepare([Given(WORDS)], "bytes", tmp_path / "c", validation=0.2)
    train, held = (texts_of(corpus, stream) for stream in (corpus.parts[0].train, corpus.parts[0].held_out))
    assert sorted(train + held) == sorted(WORDS)
    assert not set(train) & set(held)
    assert train == [w for w in WORDS if w in set(train)]  # order kept
    assert 20 < len(held) < 60


def test_equal_documents_fall_on_the_same_side(tmp_path):
    corpus = prepare([Given(WORDS + WORDS[::-1])], "bytes", tmp_path / "c", validation=0.3)
    assert not set(texts_of(corpus, corpus.parts[0].train)) & set(texts_of(corpus, corpus.parts[0].held_out))


def test_more_documents_another_order_or_tokenizer_move_none_across(tmp_path):
    few = prepare([Given(WORDS[:100])], "bytes", tmp_path / "few", validation=0.2)
    many = prepare([Given(WORDS[::-1])], str(byte_level(tmp_path)), tmp_path / "many", validation=0.2)
    held_few, held_many = (set(texts_of(c, c.parts[0].held_out)) for c in (few, many))
    assert held_few == held_many & set(WORDS[:100])


def test_a_larger_share_holds_out_more_and_keeps_what_was_held(tmp_path):
    held = [
        set(texts_of(c, c.parts[0].held_out))
        for c in (prepare([Given(WORDS)], "bytes", tmp_path / str(share), validation=share) for share in (0.05, 0.2, 0.6))
    ]
    assert held[0] < held[1] < held[2]


def test_should_chance_hold_out_none_one_is(tmp_path):
    corpus = prepare([Given(["a", "b", "c"])], "bytes", tmp_path / "c", validation=1e-6)
    assert (corpus.parts[0].train.documents, corpus.parts[0].held_out.documents) == (2, 1)


def test_a_source_may_be_held_out_whole_or_not_at_all(tmp_path):
    sources = [Given(WORDS[:50], hold_out="none"), Given(WORDS[50:60], hold_out="all")]
    train, held = prepare(sources, "bytes", tmp_path / "c").parts
    assert (train.train.documents, train.held_out.documents) == (50, 0)
    assert (held.train.documents, held.held_out.documents) == (0, 10)
    assert [train.name, held.name] == ["given", "given-2"]


def test_any_window_of_a_stream_is_its_tokens_and_documents(tmp_path):
    corpus = prepare([Given(WORDS[:40])], "bytes", tmp_path / "c", validation=0.5)
    for stream in (corpus.parts[0].train, corpus.parts[0].held_out):
        texts = texts_of(corpus, stream)
        ids = [id for text in texts for id in [*text.encode(), 256]]
        owner = [n for n, text in enumerate(texts) for _ in [*text.encode(), 256]]
        for first in range(0, len(ids), 3):
            for count in (1, 2, 17, 90, len(ids) - first):
                window = stream.read(first, min(count, len(ids) - first))
                assert window.ids.tolist() == ids[first : first + count]
                assert (window.document + owner[first]).tolist() == owner[first : first + count]


def test_opening_again_gives_the_same_corpus_and_text_is_read_once(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(WORDS))
    source = {"name": "text", "paths": [str(tmp_path / "a.txt")], "document": "paragraph"}
    first = prepare([source], "bytes", tmp_path / "c")
    (tmp_path / "a.txt").write_text("changed")
    again = prepare([source], "bytes", tmp_path / "c")
    assert again.fingerprint == first.fingerprint == open_corpus(tmp_path / "c").fingerprint
    assert first.describe() == again.describe()
    assert "text: " in first.describe()
    assert "held out" in first.describe()


def test_the_fingerprint_changes_with_a_file_the_weights_the_split_and_the_tokenizer(tmp_path):
    def fingerprint(folder, text="\n\n".join(WORDS), tokenizer="bytes", validation=0.1, weight=1.0):
        (tmp_path / "a.txt").write_text(text)
        paths = {"name": "text", "paths": [str(tmp_path / "a.txt")], "document": "paragraph", "weight": weight}
        return prepare([paths, "stdlib"], tokenizer, tmp_path / folder, validation=validation).fingerprint

    other = str(byte_level(tmp_path))
    prints = [
        fingerprint("same"),
        fingerprint("text", "\n\n".join(WORDS).replace("number 7 ", "number 8 ")),
        fingerprint("weight", weight=2.0),
        fingerprint("split", validation=0.2),
    ]
    assert len(set(prints)) == len(prints)
    assert fingerprint("again") == prints[0]
    small = [prepare([Given(WORDS)], name, tmp_path / f"t{n}").fingerprint for n, name in enumerate(("bytes", other))]
    assert small[0] != small[1]


def test_another_request_for_the_same_folder_is_refused(tmp_path):
    prepare(["stdlib"], "bytes", tmp_path / "c")
    with pytest.raises(DataError, match=r"c was prepared with other data\.validation; restore that setting, or give another run\.folder"):
        prepare(["stdlib"], "bytes", tmp_path / "c", validation=0.5)
    with pytest.raises(DataError, match=r"other data\.sources"):
        prepare([{"name": "stdlib", "weight": 2.0}], "bytes", tmp_path / "c")
    with pytest.raises(DataError, match=r"other data\.tokenizer"):
        prepare(["stdlib"], str(byte_level(tmp_path)), tmp_path / "c")


def test_the_tokenizer_travels_with_the_corpus(tmp_path):
    folder = byte_level(tmp_path)
    corpus = prepare([Given(WORDS)], str(folder), tmp_path / "c")
    (folder / "tokenizer.json").unlink()
    assert open_corpus(tmp_path / "c").tokenizer.hash == corpus.tokenizer.hash
    (tmp_path / "c" / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    with pytest.raises(DataError, match=r"the tokenizer in .* has changed since the corpus was prepared"):
        open_corpus(tmp_path / "c")


def test_tokens_of_another_tokenizer_are_refused(tmp_path):
    tokenize([Given(WORDS)], tmp_path / "made", str(byte_level(tmp_path)))
    tokens = {"name": "tokens", "paths": [str(tmp_path / "made")]}
    with pytest.raises(
        DataError, match=r"made was tokenised by another tokenizer \([0-9a-f]{12}… instead of [0-9a-f]{12}…\); set data\.tokenizer"
    ):
        prepare([tokens], "bytes", tmp_path / "c")
    assert not (tmp_path / "c").exists()
    corpus = prepare([tokens], str(tmp_path / "made"), tmp_path / "c")
    assert set(texts_of(corpus, corpus.parts[0].train)) < set(WORDS)


def test_shards_that_change_under_a_corpus_are_named_when_it_is_opened(tmp_path):
    shard = tmp_path / "x.bin"
    shard.write_bytes(np.arange(200, dtype="<u2").tobytes())
    source = {"name": "tokens", "paths": [str(shard)], "hold_out": "none"}
    prepare([source], "bytes", tmp_path / "c")
    shard.write_bytes(np.arange(1, 201, dtype="<u2").tobytes())
    with pytest.raises(DataError, match=r"x\.bin has changed since it was written"):
        prepare([source], "bytes", tmp_path / "c")
    shard.write_bytes(np.arange(300, dtype="<u2").tobytes())
    with pytest.raises(DataError, match=r"x\.bin has 600 bytes instead of 400"):
        open_corpus(tmp_path / "c")


def test_a_damaged_corpus_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*corpus\.json: No such file"):
        open_corpus(tmp_path)
    prepare([Given(WORDS)], "bytes", tmp_path / "c")
    index = json.loads((tmp_path / "c" / "corpus.json").read_text())
    (tmp_path / "c" / "corpus.json").write_text(json.dumps(index | {"asked": {}}))
    with pytest.raises(DataError, match=r"corpus\.json is damaged; remove .*c to prepare it again"):
        open_corpus(tmp_path / "c")


def test_the_standard_library_is_a_corpus(tmp_path):
    corpus = prepare(["stdlib"], "bytes", tmp_path / "c")
    part = corpus.parts[0]
    texts = [text for text in Stdlib().documents() if text]
    assert part.train.documents + part.held_out.documents == len(texts)
    assert len(part.train) + len(part.held_out) == sum(len(text.encode()) + 1 for text in texts)
    assert set(texts_of(corpus, part.held_out)) | set(texts_of(corpus, part.train)) == set(texts)
    assert "standard library of CPython" in corpus.describe()
    assert part.tokens.meta["text_sha256"][:12] in corpus.describe()
