"""What evaluations share: frozen trunk and linear classifiers. Imports utils.learning, utils.data and utils.run."""
