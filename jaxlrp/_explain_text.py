"""What ``jaxlrp explain-text`` does: read texts, explain them in batches, print and write."""

from __future__ import annotations

import argparse
import os
import re
import stat
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import targets
from ._explain import CommandError, _output_folder, _Progress
from ._report_text import PAGE, Text, report, write
from .accounts import balance
from .models.imagenet import UnknownClassError
from .models.minilm import pad, with_embeddings
from .models.news import News, NewsClassifier, classify_news, load_news
from .plot.text import printable
from .presets import PRESETS
from .transform import Setup

COMPOSITES = ("attnlrp", "cplrp", "epsilon")
EXAMPLES = ("sports", "business", "tech")  # classes of which an article is shown when no text is given
FEWEST_TOKENS = 8
_MOST_BYTES = 10_000_000  # of a file
_ROUND = 16  # texts are padded to a multiple of this many tokens


def explain_text(arguments: argparse.Namespace) -> int:
    """Explain texts and write what was found."""
    if arguments.contrast is not None and arguments.contrastive:
        raise CommandError("--contrast names one class, --contrastive means all others: give one of them")
    with _output_folder(arguments.out) as out, _Progress() as progress:
        sources, skipped = _read(arguments.texts, progress)
        if arguments.texts and not sources:
            raise CommandError("none of the texts could be read")
        news = load_news()
        target, rival = (_find_class(name, news.classes) for name in (arguments.target, arguments.contrast))
        if target is not None and target == rival:
            raise CommandError(f"--target and --contrast are the same class, {news.classes[target]}")
        texts, empty = _tokenise(sources or _examples(news), news, arguments.tokens, progress)
        if not texts:
            raise CommandError("none of the texts has a word in it")
        model = classify_news(news, _cache(arguments), progress.each, lambda line: progress.print(f"jaxlrp: {line}"))
        seconds = _run(model, texts, target, rival, arguments, progress)
        texts, same = _with_a_rival(texts, news, progress)
        if not texts:
            raise CommandError("every text is predicted as the class of --contrast; name another, or a --target")
        write(out, texts, model, arguments)
    report(texts, model, arguments.ledger)
    print(f"head: {100 * model.accuracy:.1f} % of {len(news.held_out)} held-out articles right")
    print(f"compiled in {seconds[0]:.1f} s, {seconds[1] / len(texts):.2f} s per text")
    print(f"wrote {out / PAGE} and a folder for each of {len(texts)} texts")
    skipped += [*empty, *same]
    if skipped:
        print(f"skipped {len(skipped)} of {len(skipped) + len(texts)} texts", file=sys.stderr)
    return 1 if skipped else 0


# -- before -----------------------------------------------------------------------------------------------------------


def _cache(arguments: argparse.Namespace) -> Path | None:
    if arguments.no_cache:
        return None
    if arguments.cache is not None:
        return Path(arguments.cache)
    with suppress(RuntimeError):  # nobody's home
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxlrp"
    return None


def _read(given: Sequence[str], progress: _Progress) -> tuple[list[tuple[str, str]], list[str]]:
    """Names and texts; what cannot be read is named on standard error.

    An argument is a file if there is one of this name, and also if it looks like a name: no white space in it, or a
    usual ending behind it.
    """
    found: list[tuple[str, str]] = []
    skipped: list[str] = []
    names: set[str] = set()
    for argument in given:
        is_file = os.path.exists(argument) or not re.search(r"\s", argument) or _ENDING.search(argument)
        try:
            text = _read_file(Path(argument)) if is_file else _checked(argument)
        except ValueError as error:
            what = printable(argument) if len(argument) < 200 else f"{printable(argument[:80])}..."
            progress.print(f"jaxlrp: skipped {what}: {error}")
            skipped.append(argument)
            continue
        stem = Path(argument).stem if is_file else " ".join(argument.split()[:4])
        name, k = re.sub(r"[^\w.-]+", "_", stem).strip("_.")[:40] or "text", 2
        while name in names:
            name, k = f"{name.removesuffix(f'-{k - 1}')}-{k}", k + 1
        names.add(name)
        found.append((name, text))
    return found, skipped


_ENDING = re.compile(r"\.(txt|text|md)$", re.IGNORECASE)


def _read_file(path: Path) -> str:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ValueError("this is a folder, not a file")
        if not stat.S_ISREG(status.st_mode):  # a pipe or device could block or never end
            raise ValueError("this is not a regular file")
        if status.st_size > _MOST_BYTES:
            raise ValueError(f"{status.st_size:,} bytes; at most {_MOST_BYTES:,} are read")
        return _checked(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise ValueError("no such file; a text of one word must stand in one") from error
    except UnicodeDecodeError as error:
        raise ValueError("not a text in UTF-8") from error
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error})") from error


def _checked(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # bytes on the command line that are none
        raise ValueError("not a text in UTF-8") from error
    if not text.strip():
        raise ValueError("empty")
    return text


def _examples(news: News) -> list[tuple[str, str]]:
    """The first held-out article of some classes, whatever the model makes of it."""
    labels = [news.classes.index(name) for name in EXAMPLES if name in news.classes]
    articles = [next(a for a in news.held_out if a.label == label) for label in labels]
    return [(a.name, a.text) for a in articles]


def _find_class(name: str | None, classes: Sequence[str]) -> int | None:
    """The number of the class with this name, number or part of a name; None for the predicted one."""
    if name is None or name == "predicted":
        return None
    wanted = name.strip().casefold()
    if wanted.isdecimal() and int(wanted) < len(classes):
        return int(wanted)
    matches = [k for k, known in enumerate(classes) if wanted == known.casefold()] or [
        k for k, known in enumerate(classes) if wanted and wanted in known.casefold()
    ]
    if len(matches) != 1:
        raise UnknownClassError(f"No class, or more than one, is called {name!r}. Classes: {', '.join(classes)}.")
    return matches[0]


def _tokenise(
    sources: Sequence[tuple[str, str]], news: News, limit: int, progress: _Progress
) -> tuple[list[Text], list[str]]:
    most = news.bert.config.max_positions
    if limit > most:
        raise CommandError(f"--tokens {limit}: the model reads at most {most}")
    texts, skipped = [], []
    for name, text in sources:
        tokens = news.tokenise(text, limit)
        if all(word is None for word in tokens.words):
            progress.print(f"jaxlrp: skipped {name}: there is no word in it")
            skipped.append(name)
            continue
        if tokens.cut:
            whole = len(tokens.ids) + tokens.cut
            progress.print(f"jaxlrp: {name}: {tokens.cut} of its {whole} tokens are cut off (--tokens {limit})")
        texts.append(Text(name, tokens))
    return texts, skipped


def _with_a_rival(texts: list[Text], news: News, progress: _Progress) -> tuple[list[Text], list[str]]:
    """Drop texts whose predicted class is that of ``--contrast``: there is nothing to tell apart."""
    same = [t.name for t in texts if t.target == t.rival]
    for t in texts:
        if t.target == t.rival:
            progress.print(f"jaxlrp: skipped {t.name}: predicted as {news.classes[t.target]}, the class of --contrast")
    return [t for t in texts if t.target != t.rival], same


# -- the work ---------------------------------------------------------------------------------------------------------


def _run(
    model: NewsClassifier,
    texts: Sequence[Text],
    target: int | None,
    rival: int | None,
    arguments: argparse.Namespace,
    progress: _Progress,
) -> tuple[float, float]:
    """Explain all texts; returns the seconds for compiling and for running."""

    def logits_of(words: jax.Array, positions: jax.Array, types: jax.Array, variables: Any, mask: jax.Array) -> Any:
        return model.module.apply(with_embeddings(variables, positions, types), words, mask, method="encode")

    setup = Setup(logits_of, PRESETS[arguments.composite](), (0, 1, 2))

    def one(variables: Any, ids: jax.Array, mask: jax.Array) -> Any:
        """Forward pass, fold and ledger of one text; vmapped, so that every text has a ledger of its own."""
        words = model.module.apply(variables, ids, method="embed")
        tables = variables["params"]["bert"]
        positions, types = (tables[f"{kind}_embeddings"]["embedding"] for kind in ("position", "type"))
        forward = setup.forward((words, positions, types, variables, mask), {})
        logits = forward.output
        chosen = jnp.argmax(logits) if target is None else jnp.asarray(target)
        ledger, relevance = balance(forward, _start(chosen, rival, arguments.contrastive)(logits))
        of_words, of_positions, of_types = forward.gather(relevance)
        return jax.nn.softmax(logits), chosen, of_words, of_positions.sum(-1), of_types.sum(), ledger

    length = -(-max(len(t.tokens.ids) for t in texts) // _ROUND) * _ROUND
    length = min(length, model.module.config.max_positions)
    size = min(arguments.batch, len(texts))
    batches = [list(texts[k : k + size]) for k in range(0, len(texts), size)]
    filled = [pad([t.tokens for t in some + [some[-1]] * (size - len(some))], length) for some in batches]
    with progress.task("compiling"):
        begin = time.perf_counter()
        program = jax.jit(jax.vmap(one, in_axes=(None, 0, 0))).lower(model.variables, *filled[0]).compile()
        compiled = time.perf_counter() - begin
    begin = time.perf_counter()
    for some, arrays in zip(progress.each("explaining", batches), filled, strict=True):
        results = jax.tree.map(np.asarray, program(model.variables, *arrays))
        for i, text in enumerate(some):
            probabilities, chosen, words, positions, types, ledger = jax.tree.map(lambda a, i=i: a[i], results)
            count = len(text.tokens.ids)
            text.probabilities, text.target, text.rival = probabilities, int(chosen), rival
            text.relevance, text.positions, text.types = words[:count], positions[:count], float(types)
            text.ledger = ledger
    return compiled, time.perf_counter() - begin


def _start(chosen: Any, rival: int | None, contrastive: bool) -> targets.Target:
    """What relevance starts with. `targets.contrastive` does not fit here.

    It gives a class 1 for its logit whatever the sign of that is, so that words which speak for a rival with a
    negative logit would be counted as words for the class. `targets.log_odds` starts with the margins themselves.
    """
    if contrastive:
        return targets.log_odds(chosen)
    return targets.logit(chosen) if rival is None else targets.difference(chosen, rival)
