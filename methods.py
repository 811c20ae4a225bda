"""The one registry of methods: name -> class. A new method is a package and a line here."""

from moco.builder import MoCo
from mosrep.builder import MosRep

METHODS = {"mosrep": MosRep, "moco": MoCo}
