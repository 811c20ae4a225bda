"""What evaluations share: the frozen trunk and its features, and linear classifiers on them.

Imports utils.learning, utils.data and utils.run.
"""
