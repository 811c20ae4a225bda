"""From shards to batches: indexes, tars, readers, the order of samples, views and their colours.

Knows no method and no network; imports utils.run.
"""
