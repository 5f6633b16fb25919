"""Networks of every family, each small and each with an oracle of its relevance."""

from . import attention, graphs, libraries, recurrent, structure, vision
from ._ops import DETACHED as DETACHED
from ._ops import PLAIN as PLAIN
from ._ops import Case as Case
from ._ops import Family as Family
from ._ops import Ops as Ops
from ._ops import Weights as Weights
from ._ops import family as family

FAMILIES: list[Family] = [
    *vision.FAMILIES,
    *attention.FAMILIES,
    *recurrent.FAMILIES,
    *graphs.FAMILIES,
    *structure.FAMILIES,
    *libraries.FAMILIES,
]
