"""What methods and training loops are made of: the method contract, losses, key queue, mixtures, trunks, optimizers.

Knows neither shards nor files; imports utils.run, and of utils.data only views and photometric.
"""
