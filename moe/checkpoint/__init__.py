"""Checkpoints: torch's DCP puts shards together, and our own rules meet everything a file system can do to them.

    store.py      save a step on all ranks or on none, find the newest whole one, load it into any sharding
    manifest.py   what a checkpoint holds, signed; the format and its version
    writer.py · reader.py   the two ends of DCP: hashed while written, distrusted when read
    shelf.py      names of folders, what is committed, what is left over, what is kept
    ranks.py      pass a phase together or fail together          weights.py   final weights as safetensors

**Names (format 1).** A key is a global name and stands for a global tensor, whoever holds which part of it:

    model.<parameter or buffer>                    model.blocks.3.moe.experts.up      [E, 2 or 1, f, d]
    optimizer.<moment>.<parameter>                 optimizer.exp_avg.blocks.3.moe.experts.down   [E, d, f]
    optimizer.step, …                              small tensors; everything else is JSON in the manifest

All experts of a layer are one key per kind, and expert e is row e of it. Any rank may write any box of a key, so a layer cut along
its width, whole experts or experts scattered over owners all fill the same key, and any of them loads what another wrote. Measured at
60 layers of 256 experts with two moments, 2 ranks (benchmarks/results/checkpoint-keys_cpu_2026-11-21.md), saving takes 0.6 s with these
360 keys, 23 s with a key for each expert (46,080) and 85 s with one for each of its matrices (138,240); loading 0.25, 16 and 56 s.
Where every expert is a chunk of its own owner, the stack costs 41 s over 2 ranks: the number of chunks counts, not that of keys.

**Life of a save.** All ranks vote; rank 0 makes `step-00000040.tmp-1a2b3c4d`; every rank writes its file; rank 0 writes the manifest, then
gives the folder its name `step-00000040`. A folder of that name is never written into again. A killed save leaves a folder that is
passed over and removed by the next save.
"""
