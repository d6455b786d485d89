"""A small byte-level tokenizer, and a source of given texts."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moe.data.sources import TextSource


def byte_level(folder, config: dict | None = None, special: tuple[str, ...] = ("<|endoftext|>",)):
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(["the cat sat on the mat äöü 日本語 日本語 🙂"] * 20, trainer)
    library.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


class Given(TextSource):
    """Texts at hand; raises what it is told to at its end."""

    name = "given"

    def __init__(self, texts, then=None, **options):
        super().__init__(**options)
        self.texts, self.then = texts, then

    def documents(self):
        yield from self.texts
        if self.then is not None:
            raise self.then

    def describe(self):
        return "given texts"
