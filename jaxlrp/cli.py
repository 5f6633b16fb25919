"""The command line: ``jaxlrp explain``, ``jaxlrp explain-text`` and ``jaxlrp layers``."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from typing import Any

from . import _explain, _explain_text
from .errors import LRPError
from .models import MODELS, UnknownClassError, UnknownModelError, WeightFileError
from .models.bert import ModelConfigError
from .models.news import NewsError
from .plot import COLOUR_MAPS
from .presets import PRESETS

_BAD_FILES = (WeightFileError, ModelConfigError, NewsError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 if everything was done, 1 if some photos or texts were skipped, 2 if nothing could be done.
    """
    arguments = _parser().parse_args(argv)
    try:
        status = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except (LRPError, *_BAD_FILES, UnknownModelError, UnknownClassError, _explain.CommandError) as error:
        print(f"jaxlrp: error: {error}", file=sys.stderr)
    except ImportError as error:
        hint = "" if "pip install" in str(error) else ' (the demo needs: pip install "jaxlrp[demo]")'
        print(f"jaxlrp: error: {error}{hint}", file=sys.stderr)
    except BrokenPipeError:  # who reads the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("jaxlrp: interrupted", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxlrp", description="Explain what a network looked at.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    explain = commands.add_parser(
        "explain",
        help="explain photos: which pixels spoke for the predicted class",
        description="Explain photos by layer-wise relevance propagation. For each photo an overlay, a signed heat map "
        "and the raw relevance are written, and one contact sheet for all.",
    )
    explain.add_argument("photos", nargs="*", metavar="PHOTO", help="image files; left out: photos of scikit-image")
    explain.add_argument("--out", default="jaxlrp-out", metavar="FOLDER", help="where to write (default: %(default)s)")
    explain.add_argument(
        "--target",
        metavar="CLASS",
        help="class name or index to explain (default: the predicted one of each photo)",
    )
    explain.add_argument(
        "--compare",
        action="store_true",
        help="put gradient, gradient x input, integrated gradients and SmoothGrad beside it",
    )
    explain.add_argument(
        "--layers",
        nargs="?",
        const=_explain.EVENLY,
        metavar="GLOB",
        help="also write heat maps at the inputs of hidden layers: --layers='blocks_3_*/project*'; "
        "without a pattern, six spread over the depth",
    )
    explain.add_argument(
        "--batch", type=_positive, default=8, metavar="N", help="photos per batch (default: %(default)s)"
    )
    explain.add_argument("--cmap", choices=COLOUR_MAPS, default=COLOUR_MAPS[0], help="colours (default: %(default)s)")
    explain.set_defaults(run=_explain.explain)

    _add_explain_text(commands)

    layers = commands.add_parser("layers", help="print a model's layers and the rule that each one gets")
    layers.set_defaults(run=_explain.layers)

    for command in (explain, layers):
        command.add_argument(
            "--bias",
            choices=("absorb", "ignore", "redistribute"),
            default="absorb",
            help="what becomes of the share of biases: lost, left out, spread over inputs (default: %(default)s)",
        )
        command.add_argument(
            "--model",
            default=next(iter(MODELS)),
            metavar="NAME",
            help=f"one of: {', '.join(MODELS)} (default: the first)",
        )
        command.add_argument(
            "--composite",
            default="epsilon_plus_flat",
            metavar="NAME",
            type=_composite,
            help=f"one of: {', '.join((*PRESETS, 'epsilon_gamma_box'))} (default: %(default)s)",
        )
    return parser


def _add_explain_text(commands: Any) -> None:
    texts = commands.add_parser(
        "explain-text",
        help="explain texts: which words spoke for the predicted class of news",
        description="Explain texts by layer-wise relevance propagation, with MiniLM and a head that is trained on BBC "
        "news. The words are printed in colours, and a page and the raw relevance are written.",
    )
    texts.add_argument(
        "texts",
        nargs="*",
        metavar="TEXT-or-FILE",
        help="a text in quotes or the name of a file; left out: news articles that the head has not seen",
    )
    texts.add_argument("--out", default="jaxlrp-text", metavar="FOLDER", help="where to write (default: %(default)s)")
    texts.add_argument(
        "--target",
        default="predicted",
        metavar="CLASS",
        help="class to explain (default: that predicted for each text)",
    )
    texts.add_argument("--contrast", metavar="CLASS", help="explain why the target and not this class")
    texts.add_argument(
        "--contrastive",
        action="store_true",
        help="explain why the target and not any other class; close rivals count most",
    )
    texts.add_argument(
        "--composite",
        choices=_explain_text.COMPOSITES,
        default=_explain_text.COMPOSITES[0],
        help="default: %(default)s",
    )
    texts.add_argument(
        "--tokens",
        type=_tokens,
        default=256,
        metavar="N",
        help="read at most so many tokens of each text (default: %(default)s, at most 512)",
    )
    texts.add_argument("--batch", type=_positive, default=8, metavar="N", help="texts per batch (default: %(default)s)")
    texts.add_argument("--ledger", action="store_true", help="print every single layer of the ledger")
    texts.add_argument(
        "--cache", metavar="FOLDER", help="where the trained head is kept (default: jaxlrp in the user's cache folder)"
    )
    texts.add_argument("--no-cache", action="store_true", help="train the head anew and do not keep it")
    texts.set_defaults(run=_explain_text.explain_text)


def _tokens(text: str) -> int:
    number = _positive(text)
    if number < _explain_text.FEWEST_TOKENS:
        raise argparse.ArgumentTypeError(f"must be at least {_explain_text.FEWEST_TOKENS}, not {text!r}")
    return number


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return number


def _composite(text: str) -> str:
    known = (*PRESETS, "epsilon_gamma_box")
    name = text.lower().replace("-", "_")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise argparse.ArgumentTypeError(f"unknown composite {text!r}{hint} Known: {', '.join(known)}")
    return name
