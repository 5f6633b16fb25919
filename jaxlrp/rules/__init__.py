"""Rules: how one layer hands its relevance to its inputs. One family a file."""

from ._base import Known as Known
from ._base import LayerCall as LayerCall
from ._base import Rule as Rule
from ._base import stabilise as stabilise
from ._base import total as total
from ._first import Flat as Flat
from ._first import WSquare as WSquare
from ._first import ZBox as ZBox
from ._gradient import DeconvNetReLU as DeconvNetReLU
from ._gradient import Gradient as Gradient
from ._gradient import GuidedReLU as GuidedReLU
from ._signed import AlphaBeta as AlphaBeta
from ._signed import Epsilon as Epsilon
from ._signed import Gamma as Gamma
from ._signed import Norm as Norm
from ._signed import Zero as Zero
from ._signed import ZPlus as ZPlus
from ._split import SplitRule as SplitRule
from ._structure import Constant as Constant
from ._structure import EqualShare as EqualShare
from ._structure import HoldScale as HoldScale
from ._structure import LayerByLayer as LayerByLayer
from ._structure import Pass as Pass
from ._structure import Residual as Residual
from ._structure import Route as Route
from ._structure import SignalTakeAll as SignalTakeAll
