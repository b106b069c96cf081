"""Captioned images: shards, the order in which a run sees them, decoding, and the DataModules."""
