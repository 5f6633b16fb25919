"""What jax's primitives mean for relevance, as a few sets.

A primitive in none of them, met on the way from the input to the output, is an error that names it
(`jaxlrp.UnknownPrimitiveError`): nothing is ever silently treated as a gradient.
"""

from __future__ import annotations

from ._compat import primitives

DOT = primitives("dot_general")
CONV = primitives("conv_general_dilated")
ADD = primitives("add", "add_jaxvals")
SUB = primitives("sub")
MUL = primitives("mul")
DIV = primitives("div")
NEG = primitives("neg")
MAXMIN = primitives("max", "min")
SELECT = primitives("select_n")
BROADCAST = primitives("broadcast_in_dim")
CAST = primitives("convert_element_type", "reduce_precision", "copy", "name")
BARRIER = primitives("optimization_barrier")
PROD = primitives("reduce_prod")
RESHAPE = primitives("reshape", "squeeze", "transpose", "broadcast_in_dim", "expand_dims")
TRANSPOSE = primitives("transpose")
STOP_GRADIENT = primitives("stop_gradient")
MAX = primitives("max")
MIN = primitives("min")
GREATER = primitives("gt", "ge")
EQUAL = primitives("eq")
IOTA = primitives("iota")
GATHER = primitives("gather")
LOOKUP = primitives("gather", "dynamic_slice")
CLAMP = primitives("clamp")
LOG = primitives("log", "log1p", "log2")
EXP = primitives("exp", "exp2", "expm1")
#: Elementwise functions that take so long that each number had better be computed once.
COSTLY = LOG | EXP | primitives("sin", "cos", "tan", "pow", "tanh", "logistic", "erf")
CUSTOM_CALLS = primitives("custom_jvp_call", "custom_vjp_call")

#: One number in, one number out, at every position.
ELEMENTWISE = (
    primitives(
        *[
            "abs",
            "acos",
            "acosh",
            "asin",
            "asinh",
            "atan",
            "atan2",
            "atanh",
            "bessel_i0e",
            "bessel_i1e",
            "cbrt",
            "ceil",
            "clamp",
            "clz",
            "cos",
            "cosh",
            "digamma",
            "eq",
            "erf",
            "erf_inv",
            "erfc",
            "exp",
            "exp2",
            "expm1",
            "floor",
            "ge",
            "gt",
            "imag",
            "integer_pow",
            "is_finite",
            "le",
            "lgamma",
            "log",
            "log1p",
            "log2",
            "logistic",
            "lt",
            "max",
            "min",
            "ne",
            "nextafter",
            "not",
            "and",
            "or",
            "xor",
            "one_minus_square",
            "polygamma",
            "polynomial",
            "population_count",
            "pow",
            "real",
            "rem",
            "round",
            "rsqrt",
            "sharding_constraint",
            "shift_left",
            "shift_right_arithmetic",
            "shift_right_logical",
            "sign",
            "sin",
            "sinh",
            "sqrt",
            "square",
            "tan",
            "tanh",
        ]
    )
    | ADD
    | SUB
    | MUL
    | DIV
    | NEG
    | SELECT
    | CAST
    | STOP_GRADIENT
    | CUSTOM_CALLS  # only elementwise ones are left as calls
)

#: Values change place, none is changed: relevance follows by the operation's transpose.
MOVE = primitives(
    *[
        "broadcast_in_dim",
        "concatenate",
        "dynamic_slice",
        "dynamic_update_slice",
        "expand_dims",
        "gather",
        "pad",
        "reshape",
        "rev",
        "scatter",
        "slice",
        "split",
        "squeeze",
        "stack",
        "tile",
        "transpose",
        "unstack",
        "copy_p",
    ]
)

#: Weightless sums.
SUMMING = primitives("reduce_sum", "reduce_window_sum", "cumsum")
WINDOW_SUM = primitives("reduce_window_sum")
SCATTER_ADD = primitives("scatter_add")

#: One operand wins and takes all.
PICKING = primitives("reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min", "cummax", "cummin")
MAX_POOL = primitives("reduce_window_max")
WINDOW_PICK = MAX_POOL | primitives("reduce_window_min")
SORTING = primitives("sort", "top_k", "approx_top_k")

SCATTER_PICK = primitives("scatter_max", "scatter_min")

#: Many numbers in, fewer out: a statistic of its operand as long as it is used as one. Scatters reduce segments.
REDUCTION = SUMMING | PICKING | SCATTER_ADD | SCATTER_PICK | primitives("reduce_prod", "cumprod", "cumlogsumexp")

#: What makes a statistic where it stands inside of a region; of matrix products, sums of squares alone stand there.
STATISTIC = REDUCTION | DOT

#: Decisions: what follows from them alone is constant as far as relevance is concerned.
DECIDING = primitives("argmax", "argmin", "reduce_and", "reduce_or", "reduce_xor")

RANDOM = primitives("random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform", "random_gamma")

#: Results that depend on the shape of the operands alone.
SHAPE_ONLY = primitives("iota", "empty2")
