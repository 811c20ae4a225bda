"""The one registry of methods: name -> class. A new method is a package and a line here."""

from cmc.builder import CMC, InsDis
from moco.builder import MoCo
from mosrep.builder import MosRep
from w2ssl.builder import W2SSL

METHODS = {"mosrep": MosRep, "moco": MoCo, "w2ssl": W2SSL, "cmc": CMC, "insdis": InsDis}
