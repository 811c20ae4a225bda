"""Parts of methods and training loops: the method contract, losses, key queue, mixtures, trunks, optimizers.

Knows neither shards nor files; imports utils.run, and of utils.data only views, photometric and batch.
"""
