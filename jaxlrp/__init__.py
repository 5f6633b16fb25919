"""Layer-wise Relevance Propagation for JAX and Flax.

``jaxlrp.lrp(model)`` is to relevance what ``jax.grad`` is to gradients.

>>> import jax, jax.numpy as jnp, jaxlrp
>>> explain = jax.jit(jaxlrp.lrp(lambda x, w: jax.nn.relu(x @ w), jaxlrp.Epsilon()))
>>> relevance = explain(jnp.array([1.0, 2.0]), jnp.array([[3.0], [1.0]]))
>>> [round(float(r), 3) for r in relevance]
[3.0, 2.0]
"""

from . import attributions as attributions
from . import plot as plot
from . import targets as targets
from .accounts import Ledger as Ledger
from .accounts import ledger as ledger
from .composites import Assignment as Assignment
from .composites import Assignments as Assignments
from .composites import Composite as Composite
from .errors import ConservationError as ConservationError
from .errors import InputError as InputError
from .errors import LRPError as LRPError
from .errors import NoRuleError as NoRuleError
from .errors import NotDeterministicError as NotDeterministicError
from .errors import RuleError as RuleError
from .errors import UnknownLayerError as UnknownLayerError
from .errors import UnknownPrimitiveError as UnknownPrimitiveError
from .errors import UnsupportedError as UnsupportedError
from .layers import Layer as Layer
from .presets import CPLRP as CPLRP
from .presets import AttnLRP as AttnLRP
from .presets import DeconvNet as DeconvNet
from .presets import EpsilonAlpha2Beta1 as EpsilonAlpha2Beta1
from .presets import EpsilonAlpha2Beta1Flat as EpsilonAlpha2Beta1Flat
from .presets import EpsilonGammaBox as EpsilonGammaBox
from .presets import EpsilonPlus as EpsilonPlus
from .presets import EpsilonPlusFlat as EpsilonPlusFlat
from .presets import ExcitationBackprop as ExcitationBackprop
from .presets import GradientComposite as GradientComposite
from .presets import GuidedBackprop as GuidedBackprop
from .presets import MambaLRP as MambaLRP
from .presets import RecurrentLRP as RecurrentLRP
from .registry import custom_layer as custom_layer
from .registry import register_rule as register_rule
from .rules import AlphaBeta as AlphaBeta
from .rules import Constant as Constant
from .rules import DeconvNetReLU as DeconvNetReLU
from .rules import Epsilon as Epsilon
from .rules import EqualShare as EqualShare
from .rules import Flat as Flat
from .rules import Gamma as Gamma
from .rules import Gradient as Gradient
from .rules import GuidedReLU as GuidedReLU
from .rules import HoldScale as HoldScale
from .rules import LayerByLayer as LayerByLayer
from .rules import LayerCall as LayerCall
from .rules import Norm as Norm
from .rules import Pass as Pass
from .rules import Residual as Residual
from .rules import Route as Route
from .rules import Rule as Rule
from .rules import SignalTakeAll as SignalTakeAll
from .rules import SplitRule as SplitRule
from .rules import WSquare as WSquare
from .rules import ZBox as ZBox
from .rules import Zero as Zero
from .rules import ZPlus as ZPlus
from .selectors import first as first
from .selectors import kind as kind
from .selectors import last as last
from .selectors import name as name
from .streaming import stream as stream
from .transform import Layers as Layers
from .transform import layerwise_lrp as layerwise_lrp
from .transform import lrp as lrp
from .transform import lrp_vjp as lrp_vjp
from .transform import trace as trace
from .transform import value_and_lrp as value_and_lrp

__version__ = "0.1.0"
