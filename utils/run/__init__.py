"""Parts of any run: processes, checkpoints, signals, flags, files and logs.

Knows no method, no network and no shards; imports nothing else of the project.
"""
