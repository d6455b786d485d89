"""TOKENS: read, tokenise, mix, batch; the same order on any number of ranks, resumable to the token.

sources → tokenizer → prepare (token shards on disk) → corpus (documents, split) → order (grain) → loader (batches)
"""

from __future__ import annotations
