"""Bulk backfill: the rows of files in, their vectors out, over the queue that everybody shares; exactly resumable.

A *backfill* is the whole: an input, an output and what is to be done between them. Its input files are grouped in
*shards*, each read from front to end; every `part_rows` rows of a shard are one *part*, which is written, committed and
resumed as a whole. A part is embedded in *windows*: slices that fit into memory, in which equal texts are computed once
and rows travel sorted by length.

    source ─ blocks ─► windows ─► unique texts ─► token ids ─► requests on the bulk lane ─► vectors ─► sink ─► state

It needs the extra `bulk` (pyarrow); nothing else of the producer imports it.
"""
