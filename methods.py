"""The one registry of methods: name -> class. A new method is a package and a line here."""

from cmc.builder import CMC, InsDis
from moco.builder import MoCo
from mosrep.builder import MosRep
from utils.learning.method import Method
from w2ssl.builder import W2SSL

METHODS: dict[str, type[Method]] = {"mosrep": MosRep, "moco": MoCo, "w2ssl": W2SSL, "cmc": CMC, "insdis": InsDis}
