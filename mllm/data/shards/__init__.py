"""Data in many files, on a disk or an object store, read in order: tar (WebDataset), parquet and jsonl shards."""
