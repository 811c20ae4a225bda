"""Common parts of evaluations: frozen trunk and linear classifiers. Imports utils.learning, utils.data and utils.run."""
