"""Presets: composites by the names that the field knows them by. They are nothing but lists of entries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .composites import Composite
from .rules import (
    AlphaBeta,
    Constant,
    DeconvNetReLU,
    Epsilon,
    EqualShare,
    Flat,
    Gamma,
    Gradient,
    GuidedReLU,
    HoldScale,
    LayerByLayer,
    Norm,
    Rule,
    SignalTakeAll,
    ZBox,
    Zero,
    ZPlus,
)
from .rules._split import Bias
from .selectors import first, kind, name

# ``bias`` is that of every rule in the preset, see `SplitRule`: "absorb", "ignore" or "redistribute".


def EpsilonPlus(epsilon: Any = 1e-6, *, bias: Bias = "absorb") -> Composite:
    """z+ for convolutions, epsilon for dense layers: the default."""
    return Composite((kind("linear"), Epsilon(epsilon, bias=bias)), (kind("conv"), ZPlus(bias=bias)))


def EpsilonPlusFlat(epsilon: Any = 1e-6, *, bias: Bias = "absorb") -> Composite:
    """`EpsilonPlus` with the flat rule at the first layer: smooth maps that say where, not which pixel."""
    return EpsilonPlus(epsilon, bias=bias).extend((first("linear"), Flat()))


def EpsilonGammaBox(low: Any, high: Any, epsilon: Any = 1e-6, gamma: Any = 0.25, *, bias: Bias = "absorb") -> Composite:
    """z^B for the first convolution, gamma for the others, epsilon for dense layers (Montavon et al., 2019).

    ``low`` and ``high`` are the smallest and largest possible inputs *after* preprocessing, numbers or arrays that
    broadcast.
    """
    return Composite(
        (kind("linear"), Epsilon(epsilon, bias=bias)),
        (kind("conv"), Gamma(gamma, bias=bias)),
        (first("conv"), ZBox(low, high)),
    )


def EpsilonAlpha2Beta1(epsilon: Any = 1e-6, *, bias: Bias = "absorb") -> Composite:
    """Alpha 2, beta 1 for convolutions, epsilon for dense layers."""
    return Composite((kind("linear"), Epsilon(epsilon, bias=bias)), (kind("conv"), AlphaBeta(2.0, 1.0, bias=bias)))


def EpsilonAlpha2Beta1Flat(epsilon: Any = 1e-6, *, bias: Bias = "absorb") -> Composite:
    """`EpsilonAlpha2Beta1` with the flat rule at the first layer (Kohlbrenner et al., 2020)."""
    return EpsilonAlpha2Beta1(epsilon, bias=bias).extend((first("linear"), Flat()))


def ExcitationBackprop(*, bias: Bias = "absorb") -> Composite:
    """z+ for every linear layer, derivatives of activations (Zhang et al., 2016)."""
    return Composite((kind("linear"), ZPlus(bias=bias)), (kind("activation"), Gradient()))


def AttnLRP(epsilon: Any = 0.0, *, bias: Bias = "absorb") -> Composite:
    """The rules of AttnLRP for transformers (Achtibat et al., 2024).

    Epsilon for linear layers, scales and sums, the scale of normalisations held constant, the first-order Taylor term
    for softmax, equal shares for the factors of products (attention scores, attention times values, SwiGLU), identity
    for activations. Gates made by a sigmoid get nothing.

    With ``epsilon`` the number 0 relevance is divided by outputs at activations alone: elsewhere it goes down per unit
    of value, as the gradient does. Any other ``epsilon``, or a traced one, costs a division a layer.
    """
    return Composite(
        (kind("linear"), Epsilon(epsilon, bias=bias)),
        (kind("scale"), Epsilon(epsilon, bias=bias)),
        (kind("sum"), Norm(epsilon)),
        (kind("normalization"), HoldScale(epsilon=epsilon)),
        (kind("softmax"), Zero()),
        (kind("product"), EqualShare(epsilon=epsilon)),
        (kind("gate"), SignalTakeAll(epsilon=epsilon)),
    )


def CPLRP(epsilon: Any = 0.0, *, bias: Bias = "absorb") -> Composite:
    """The conservative rules for transformers (Ali et al., 2022): attention weights and gates count as constants.

    As `AttnLRP`, but nothing passes a softmax, so that values get all relevance of attention, and what an activation
    multiplies (the linear half of SwiGLU) gets all of a product.
    """
    return AttnLRP(epsilon, bias=bias).extend(
        (kind("softmax"), Constant()), (kind("product"), SignalTakeAll(epsilon=epsilon))
    )


def RecurrentLRP(epsilon: Any = 1e-6, *, bias: Bias = "absorb") -> Composite:
    """The rules for LSTM and GRU (Arras et al., 2017): epsilon throughout, and gates get nothing."""
    return AttnLRP(epsilon, bias=bias).extend((kind("product"), SignalTakeAll(epsilon=epsilon)))


def MambaLRP(constant: str | Sequence[str] = "**/x_proj", epsilon: Any = 1e-6, *, bias: Bias = "absorb") -> Composite:
    """The rules for selective state-space models (Jafari et al., 2024): the recurrence is linear in its input.

    What the layers named by ``constant`` compute counts as constant: the projection that makes step size, B and C
    (A is a parameter). Activations pass relevance, and the output gate shares it equally.

    Args:
        constant: globs of the names of these layers.
        epsilon: the stabiliser of linear layers, sums and products.
        bias: what becomes of the share of biases.
    """
    patterns = [constant] if isinstance(constant, str) else list(constant)
    return AttnLRP(epsilon, bias=bias).extend(*((name(pattern), Constant()) for pattern in patterns))


def GradientComposite() -> Composite:
    """The plain gradient, folded layer by layer: for comparison, and to capture gradients at hidden layers."""
    inside = LayerByLayer()
    return Composite((kind("*"), Gradient()), (kind("recurrence"), inside), (kind("branch"), inside))


def GuidedBackprop() -> Composite:
    """The gradient, with only positive gradients passing active relus (Springenberg et al., 2015)."""
    return GradientComposite().extend((kind("relu"), GuidedReLU()))


def DeconvNet() -> Composite:
    """The gradient, with only positive gradients passing relus, active or not (Zeiler & Fergus, 2014)."""
    return GradientComposite().extend((kind("relu"), DeconvNetReLU()))


def _epsilon(*, bias: Bias = "absorb") -> Composite:
    return Composite.uniform(Epsilon(bias=bias))


#: Every preset that needs no arguments, by the name it goes by on the command line.
PRESETS: dict[str, Callable[..., Composite]] = {
    "epsilon": _epsilon,
    "epsilon_plus": EpsilonPlus,
    "epsilon_plus_flat": EpsilonPlusFlat,
    "epsilon_alpha2_beta1": EpsilonAlpha2Beta1,
    "epsilon_alpha2_beta1_flat": EpsilonAlpha2Beta1Flat,
    "excitation_backprop": ExcitationBackprop,
    "attnlrp": AttnLRP,
    "cplrp": CPLRP,
    "recurrent_lrp": RecurrentLRP,
    "guided_backprop": GuidedBackprop,
    "deconvnet": DeconvNet,
    "gradient": GradientComposite,
}


def as_composite(composite: Composite | Rule | None) -> Composite:
    """The composite to use: None is `EpsilonPlus`, a single rule is `Composite.uniform` of it."""
    if composite is None:
        return EpsilonPlus()
    if isinstance(composite, Rule):
        return Composite.uniform(composite)
    if not isinstance(composite, Composite):
        what = getattr(composite, "__name__", repr(composite))
        hint = f"; call it: {what}()" if callable(composite) else ""
        raise TypeError(f"composite must be a Composite, a Rule or None, not {what}{hint}")
    return composite
