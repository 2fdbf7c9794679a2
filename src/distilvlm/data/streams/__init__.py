"""Rows of data sources that are read on demand: JSON and JSONL, and shards (WebDataset's tar files, parquet) on this
machine or in a store."""

from distilvlm.data.streams.json_rows import JsonRows, MalformedRow
from distilvlm.data.streams.places import content, here, open_rows, shards_of, state
from distilvlm.data.streams.stored import Stored

__all__ = ["JsonRows", "MalformedRow", "Stored", "content", "here", "open_rows", "shards_of", "state"]
