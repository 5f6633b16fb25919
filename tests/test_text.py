"""Texts: words and their colours, the news classifier, and the command ``jaxlrp explain-text``.

The fast tests use a tiny BERT with random weights and a tokeniser of a few lines; none of the packages is needed.
"""

from __future__ import annotations

import dataclasses
import functools
import html.parser
import importlib.util
import itertools
import json
import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import detach
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxlrp
from jaxlrp import _explain_text, _report_text
from jaxlrp.cli import main
from jaxlrp.models import WeightFileError, bert, minilm, news
from jaxlrp.plot.page import Section, Table, html_page
from jaxlrp.plot.text import Piece, colour_words, html_words, join_words, mark_words, printable, rank_words

VOCAB, HIDDEN, HEADS, LAYERS, POSITIONS = 97, 16, 4, 1, 64
CLASSES = ("business", "sports", "tech")
CONFIG = bert.BertConfig(VOCAB, HIDDEN, LAYERS, HEADS, 20, max_positions=POSITIONS)

# --- words ----------------------------------------------------------------------------------------


def test_pieces_are_joined_to_words() -> None:
    tokens = ["[CLS]", "goal", "##keeper", "'", "s", "caf", "##e", "[SEP]"]
    spans = [(0, 0), (1, 5), (5, 11), (11, 12), (12, 13), (15, 18), (18, 19), (0, 0)]
    words = [None, 0, 0, 1, 2, 3, 3, None]
    pieces = join_words(" Goalkeeper's, café ", tokens, spans, words, [0.5, 1, 2, 4, 8, 16, 32, -1])
    assert [(p.text, p.relevance) for p in pieces] == [
        *(("[CLS]", 0.5), (" ", None), ("Goalkeeper", 3), ("'", 4), ("s", 8), (", ", None), ("café", 48), ("[SEP]", -1))
    ]
    assert [p.text for p in pieces if p.special] == ["[CLS]", "[SEP]"]


def test_words_that_share_a_character_are_shown_together() -> None:
    # a tokeniser that takes a ligature apart points at the one character twice
    pieces = join_words("ﬁ x", ["f", "i", "x"], [(0, 1), (0, 1), (2, 3)], [0, 1, 2], [1.0, 2.0, 4.0])
    assert [(p.text, p.relevance) for p in pieces] == [("ﬁ", 3.0), (" ", None), ("x", 4.0)]


def test_join_words_checks_lengths() -> None:
    with pytest.raises(ValueError, match="2 tokens, 1 spans"):
        join_words("ab", ["a", "b"], [(0, 1)], [0, 1], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"shape \(1, 2\)"):
        join_words("ab", ["a"], [(0, 1)], [0], [[1.0, 2.0]])


@given(st.text(max_size=40), st.integers(0, 2**32 - 1))
def test_nothing_of_text_and_relevance_gets_lost(text: str, seed: int) -> None:
    tokens = split_text(text, 1000)
    values = np.random.default_rng(seed).normal(size=len(tokens.ids))
    pieces = join_words(text, tokens.tokens, tokens.spans, tokens.words, values)
    shown = "".join(p.text for p in pieces if not p.special)
    assert text.startswith(shown)
    assert not text[len(shown) :].strip()
    assert sum(p.relevance or 0.0 for p in pieces) == pytest.approx(values.sum(), abs=1e-9)


def test_words_are_ranked_with_all_their_occurrences() -> None:
    pieces = [
        Piece("Goal", 2.0),
        Piece(" "),
        Piece("goal", 1.5),
        Piece("tax", -1.0),
        Piece("win", 3.0),
        Piece("a", 0.0),
    ]
    pieces += [Piece("[CLS]", 9.0, special=True), Piece(",", 8.0), Piece("vote", -2.0)]
    assert rank_words(pieces) == ([("Goal", 3.5, 2), ("win", 3.0, 1)], [("vote", -2.0, 1), ("tax", -1.0, 1)])
    assert rank_words(pieces, 1) == ([("Goal", 3.5, 2)], [("vote", -2.0, 1)])


LEVELS = [Piece("a", 1.0), Piece("b", -0.5), Piece("c", 0.2), Piece("d", -0.1), Piece(" "), Piece("[SEP]", -9.0, True)]


def test_marks_have_three_levels_and_special_tokens_do_not_set_the_scale() -> None:
    assert mark_words(LEVELS) == "+++a--b+cd ---[SEP]"
    assert mark_words(LEVELS, limit=2.0) == "++a-bcd ---[SEP]"
    assert mark_words([Piece("a", 0.0), Piece("b")]) == "ab"
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="limit must be"):
            mark_words(LEVELS, limit=bad)


def test_colours_of_the_terminal() -> None:
    pytest.importorskip("rich")
    coloured = colour_words(LEVELS)
    assert coloured.plain == "abcd [SEP]"
    styles = {coloured.plain[s.start : s.end]: str(s.style) for s in coloured.spans}
    red, blue = ("#e5484d", "#b3202a"), ("#4a83f0", "#1b45b4")
    assert styles["a"] == f"bold #ffffff on {red[1]}"
    assert styles["b"] == f"bold {blue[0]}"
    assert styles["c"] == red[0]
    assert "d" not in styles


def test_control_characters_do_not_reach_the_terminal() -> None:
    evil = "\x1b[31mred\x1b]0;title\x07\r\x9bm"
    for shown in (printable(evil), mark_words([Piece(evil, 1.0)]), html_words([Piece(evil, 1.0)])):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)
        assert "red" in shown
    assert printable("a\n\tb é 😀") == "a\n\tb é 😀"


class Reader(html.parser.HTMLParser):
    """Reads a page back: its text, the numbers of its words, and whether all that is opened is closed."""

    def __init__(self, page: str):
        super().__init__()
        self.words: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in ("meta", "br"):
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1][0] == "style":
            return
        self.text += data
        if self.open and "data-r" in self.open[-1][1]:
            self.words.append((data, self.open[-1][1]))


EVIL = '</span><script>alert("&amp;")</script>'


def test_html_shows_the_text_as_it_is() -> None:
    read = Reader(html_words([Piece(EVIL, 1.0), Piece(" & "), Piece("b", -0.25), Piece("c", 0.001)]))
    assert read.text == EVIL + " & bc"
    (_, evil), (_, b), (_, c) = read.words
    assert (evil["class"], evil["style"], evil["data-r"]) == ("for", "--r:1.00", "+1.0000")
    assert (b["class"], b["style"], b["data-r"]) == ("against", "--r:0.25", "-0.2500")
    assert "class" not in c
    assert c["data-r"] == "+0.0010"


def test_a_page_stands_alone_and_escapes_everything() -> None:
    tables = [Table(EVIL, [EVIL], [[EVIL]], right=[0])]
    section = Section(EVIL, EVIL, [Piece(EVIL, 1.0)], [(EVIL, 0.25, True)], tables, EVIL)
    page = html_page(EVIL, [section], caption=EVIL)
    read = Reader(page)
    assert "script" not in read.tags
    assert read.text.count(EVIL) == 11  # title twice, heading, note, bar, word, rest, caption, and three in the table
    assert read.tags.isdisjoint({"link", "img", "iframe", "script"})
    assert not re.search(r"https?:|url\(|@import|src=", page)
    assert "prefers-color-scheme: dark" in page
    assert "width:25.0%" in page


# --- the classifier -------------------------------------------------------------------------------


def split_text(text: str, limit: int) -> minilm.Tokens:
    """A tokeniser: words and signs, in pieces of at most four characters."""
    found: list[tuple[str, tuple[int, int], int | None]] = [("[CLS]", (0, 0), None)]
    for number, word in enumerate(re.finditer(r"\w+|[^\w\s\u200b]", text)):
        for start in range(word.start(), word.end(), 4):
            end = min(start + 4, word.end())
            found.append(("##" * (start > word.start()) + text[start:end].lower(), (start, end), number))
    found.append(("[SEP]", (0, 0), None))
    kept = found if len(found) <= limit else [*found[: limit - 1], found[-1]]
    ids = [zlib.crc32(token.encode("utf-8", "replace")) % (VOCAB - 1) + 1 for token, _, _ in kept]
    tokens, spans, words = zip(*kept, strict=True)
    return minilm.Tokens(text, np.array(ids, np.int32), tokens, spans, words, len(found) - len(kept))


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    shapes = detach.bert_shapes(vocab=VOCAB, hidden=HIDDEN, layers=LAYERS, inner=20, positions=POSITIONS, labels=3)
    return detach.random_params(shapes, 0, np.float32)


WORDS = {"business": "bank shares profit", "sports": "goal match striker", "tech": "software phone chip"}


@pytest.fixture(scope="module")
def task(tensors: dict[str, np.ndarray]) -> news.News:
    rng, articles = np.random.default_rng(0), []
    for label, name in enumerate(CLASSES):
        for number in range(14):
            words = rng.choice([*WORDS[name].split() * 3, "the", "in", "of", "day"], 12)
            articles.append(news.Article(f"{name}-{number:03}", label, " ".join(words)))
    train = [a for a in articles if int(a.name[-3:]) < 10]
    held_out = [a for a in articles if a not in train]
    variables = bert.params_from_hf(tensors, CONFIG)
    return news.News(CLASSES, tuple(train), tuple(held_out), bert.Bert(CONFIG), variables, split_text, "abc")


def each(_: str, items: Any) -> Any:
    return items


@pytest.fixture(scope="module")
def model(task: news.News) -> news.NewsClassifier:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(news, "TOKENS", 24)
        return news.classify_news(task, None, each, lambda line: None)


def test_the_mean_is_over_the_tokens_of_the_text() -> None:
    hidden = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = minilm.mean_over_tokens(jnp.asarray(hidden), jnp.asarray(mask))
    np.testing.assert_allclose(found, [hidden[0, :3].mean(0), hidden[1].mean(0)], rtol=1e-6)


def test_padding_changes_nothing(model: news.NewsClassifier) -> None:
    text = split_text("a late goal in the match", 24)
    alone, padded = (minilm.pad([text], n) for n in (len(text.ids), 20))
    apply = jax.jit(model.module.apply)
    got, want = (apply(model.variables, *arrays) for arrays in (padded, alone))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_the_head_learns_and_its_logits_sum_to_zero(model: news.NewsClassifier) -> None:
    assert model.accuracy > 0.9
    head = model.variables["params"]["head"]
    np.testing.assert_allclose(head["kernel"].sum(-1), 0, atol=1e-5)
    np.testing.assert_allclose(head["bias"].sum(), 0, atol=1e-5)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(news, "TOKENS", 24)


def test_a_kept_head_is_used_again(task: news.News, small: None, tmp_path: Path) -> None:
    said: list[str] = []
    first = news.classify_news(task, tmp_path / "new" / "folder", each, said.append)
    assert [line for line in said if line.startswith("training the head on 30")]
    said.clear()
    second = news.classify_news(task, tmp_path / "new" / "folder", each, said.append)
    assert not said
    jax.tree.map(np.testing.assert_array_equal, second.variables, first.variables)
    assert second.accuracy == pytest.approx(first.accuracy)
    other = dataclasses.replace(task, fingerprint="of other files")
    news.classify_news(other, tmp_path / "new" / "folder", each, said.append)
    assert said


def test_a_damaged_head_is_not_used(tmp_path: Path) -> None:
    said: list[str] = []
    good = {"kernel": np.zeros((16, 3), np.float32), "bias": np.zeros(3, np.float32), "accuracy": np.float32(0.5)}

    def damaged(**changed: Any) -> str:
        np.savez(tmp_path / "head.npz", **{**good, **changed})
        assert news.read_head(tmp_path / "head.npz", (16, 3), said.append) is None
        return said.pop()

    assert news.read_head(tmp_path / "none.npz", (16, 3), said.append) is None
    assert not said
    assert "damaged" in damaged(kernel=np.zeros((16, 4)))
    assert "damaged" in damaged(bias=np.full(3, np.nan))
    assert "damaged" in damaged(kernel=np.array([print, None]))  # pickled, never unpickled
    (tmp_path / "head.npz").write_bytes((tmp_path / "head.npz").read_bytes()[:100])
    assert news.read_head(tmp_path / "head.npz", (16, 3), said.append) is None
    with zipfile.ZipFile(tmp_path / "head.npz", "w") as archive:
        archive.writestr("kernel.npy", b"no array")
    assert news.read_head(tmp_path / "head.npz", (16, 3), said.append) is None
    assert len(said) == 2
    np.savez(tmp_path / "head.npz", **good)
    assert news.read_head(tmp_path / "head.npz", (16, 3), said.append) is not None


def test_a_folder_that_cannot_be_written_costs_only_the_training(task: news.News, small: None, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    said: list[str] = []
    news.classify_news(task, tmp_path / "taken" / "cache", each, said.append)
    assert "cannot be kept" in said[-1]


# --- articles -------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(news, "TRAINED", 3)
    monkeypatch.setattr(news, "HELD_OUT", 2)
    for name in CLASSES:
        (tmp_path / name).mkdir()
        for number in range(7):
            (tmp_path / name / f"{number:03}.txt").write_bytes(f"{name} {number} \xa3\n".encode("cp1252"))
    return tmp_path


def test_articles_are_read_once_each(corpus: Path) -> None:
    (corpus / "tech" / "006.txt").write_text("tech 1 £", encoding="utf-8")  # a copy of 001, which has another encoding
    classes, articles = news.read_articles(corpus)
    assert classes == CLASSES
    assert len(articles) == 20
    assert articles[0] == ("business-000", 0, "business 0 £")
    train, held_out = news.split(articles, 3)
    assert [a.label for a in train] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [a.label for a in held_out] == [0, 0, 1, 1, 2, 2]
    assert not set(train) & set(held_out)
    assert news.split(articles, 3) == (train, held_out)


def test_a_corpus_that_lacks_articles(corpus: Path) -> None:
    for number in range(3):
        (corpus / "sports" / f"{number:03}.txt").unlink()
    with pytest.raises(news.NewsError, match="4 in one class"):
        news.read_articles(corpus)
    with pytest.raises(news.NewsError, match="0 in one class"):
        news.read_articles(corpus / "none")


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=re.escape(news.INSTALL)):
        news.read_articles()
    with pytest.raises(ModuleNotFoundError, match=re.escape(minilm.INSTALL)):
        minilm.model_folder()


# --- the files of the encoder ---------------------------------------------------------------------

SETTINGS = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
SETTINGS |= {"intermediate_size": 20, "max_position_embeddings": POSITIONS}


@pytest.fixture
def files(tensors: dict[str, np.ndarray], tmp_path: Path) -> Path:
    """A tiny MiniLM on disk, with the real file formats."""
    safetensors = pytest.importorskip("safetensors.numpy")
    tokenizers = pytest.importorskip("tokenizers")
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    wanted = {n: t for n, t in tensors.items() if n.startswith("bert.") and "pooler" not in n}
    safetensors.save_file(wanted, tmp_path / "model.safetensors")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "goal", "##keeper", "cafe", "'", "s", ","]
    made = tokenizers.BertWordPieceTokenizer({piece: i for i, piece in enumerate(pieces)})
    made.enable_truncation(4)
    made.enable_padding(length=12)
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_the_encoder_is_read_from_its_files(files: Path, task: news.News) -> None:
    module, variables, tokenise = minilm.load_minilm(files)
    assert module.config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, variables, task.variables)
    found = tokenise("Goalkeeper's  Café, 😀", 20)  # neither cut nor padded by what the file says
    assert found.tokens == ("[CLS]", "goal", "##keeper", "'", "s", "cafe", ",", "[UNK]", "[SEP]")
    assert found.words == (None, 0, 0, 1, 2, 3, 4, 5, None)
    assert found.ids.tolist() == [2, 4, 5, 7, 8, 6, 9, 1, 3]
    assert found.cut == 0
    pieces = join_words(found.text, found.tokens, found.spans, found.words, np.ones(9))
    assert "".join(p.text for p in pieces if not p.special) == "Goalkeeper's  Café, 😀"
    cut = tokenise("Goalkeeper's  Café, 😀", 4)
    assert cut.tokens == ("[CLS]", "goal", "##keeper", "[SEP]")
    assert cut.cut == 5


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "damage", "error", "message"),
    [
        ("model.safetensors", halve, WeightFileError, "damaged, or cut short"),
        ("model.safetensors", lambda p: p.write_bytes(b""), WeightFileError, "damaged, or cut short"),
        ("model.safetensors", lambda p: p.unlink(), WeightFileError, "cannot be read"),
        ("config.json", halve, bert.ModelConfigError, "config.json: damaged"),
        ("config.json", lambda p: p.write_text('{"vocab_size": 97}'), bert.ModelConfigError, "no 'hidden_size'"),
        ("config.json", lambda p: p.unlink(), bert.ModelConfigError, "cannot be read"),
        ("tokenizer.json", halve, bert.ModelConfigError, "no tokeniser"),
        ("tokenizer.json", lambda p: p.unlink(), bert.ModelConfigError, "no tokeniser"),
    ],
)
def test_damaged_files(files: Path, name: str, damage: Callable, error: type[Exception], message: str) -> None:
    damage(files / name)
    with pytest.raises(error, match=message):
        minilm.load_minilm(files)


def test_weights_that_are_no_numbers(files: Path, tensors: dict[str, np.ndarray]) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    name = "bert.encoder.layer.0.output.dense.bias"
    broken = {**tensors, name: np.full_like(tensors[name], np.nan)}
    safetensors.save_file({n: t for n, t in broken.items() if "classifier" not in n}, files / "model.safetensors")
    with pytest.raises(WeightFileError, match="layers_0/output/bias has numbers that are NaN"):
        minilm.load_minilm(files)


# --- the command ----------------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]
GOAL = "A late goal of the striker, & <b>the</b> bank's shares"


@pytest.fixture
def run(
    task: news.News, model: news.NewsClassifier, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Run the command with the tiny model; returns its exit status, output and errors."""
    pytest.importorskip("rich")
    monkeypatch.setattr(_explain_text, "load_news", lambda: task)
    monkeypatch.setattr(_explain_text, "classify_news", lambda *_: model)
    for variable in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(variable, raising=False)

    def command(*arguments: str | Path) -> tuple[int, str, str]:
        try:
            status = main(["explain-text", "--tokens", "40", *map(str, arguments)])
        except SystemExit as stop:  # argparse's own errors
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    return command


@pytest.fixture
def quick(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """As `run`, but with made-up relevance: for what does not depend on it."""
    ledger = jaxlrp.ledger(lambda x, w: jax.nn.relu(x @ w) @ w, jaxlrp.Epsilon())(jnp.ones(2), jnp.eye(2))
    ledger = ledger.replace(layers=("embedding_norm", "layers_0/output", "head"))

    def made_up(
        model: Any, texts: list[_report_text.Text], target: int | None, rival: int | None, *_: Any
    ) -> tuple[float, float]:
        for text in texts:
            counts = [sum(word in text.tokens.text for word in WORDS[name].split()) for name in CLASSES]
            text.probabilities = np.array(counts) / max(1, sum(counts))
            text.target, text.rival = int(np.argmax(counts)) if target is None else target, rival
            text.relevance = np.random.default_rng(0).normal(size=(len(text.tokens.ids), HIDDEN))
            text.positions, text.ledger = np.zeros(len(text.tokens.ids)), ledger
        return 0.0, 0.0

    monkeypatch.setattr(_explain_text, "_run", made_up)
    return run


def result(folder: Path) -> tuple[dict[str, Any], np.ndarray]:
    """What the command wrote of one text."""
    assert sorted(p.name for p in folder.iterdir()) == ["relevance.npy", "tokens.json"]
    document = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
    return document, np.load(folder / "relevance.npy", allow_pickle=False)


def pooled(
    steps: detach.Steps, p: Any, head: Any, words: jax.Array, positions: jax.Array, types: jax.Array
) -> jax.Array:
    """The classifier as a function whose gradient times input is AttnLRP or CP-LRP; see `detach`."""
    x = steps.layer_norm(p, "bert.embeddings.LayerNorm", words + positions + types, 1e-12)
    allowed = jnp.ones((len(x), len(x)), bool)
    for i in range(LAYERS):
        at = f"bert.encoder.layer.{i}"
        q, k, v = (
            detach.by_head(detach.linear(p, f"{at}.attention.self.{n}", x), HEADS) for n in ("query", "key", "value")
        )
        mixed = jnp.concatenate([steps.attention(*qkv, allowed) for qkv in zip(q, k, v, strict=True)], -1)
        x = x + detach.linear(p, f"{at}.attention.output.dense", mixed)
        x = steps.layer_norm(p, f"{at}.attention.output.LayerNorm", x, 1e-12)
        y = steps.activation(detach.gelu_erf, detach.linear(p, f"{at}.intermediate.dense", x))
        x = steps.layer_norm(p, f"{at}.output.LayerNorm", x + detach.linear(p, f"{at}.output.dense", y), 1e-12)
    return x.mean(0) @ head["kernel"] + head["bias"]


@pytest.mark.parametrize(
    ("composite", "method", "rival", "batch"), [("attnlrp", "attnLRP", None, 8), ("cplrp", "cp_LRP", "tech", 2)]
)
def test_relevance_is_that_of_the_published_rules(
    run: Run,
    model: news.NewsClassifier,
    tensors: dict[str, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    composite: str,
    method: str,
    rival: str | None,
    batch: int,
) -> None:
    # gradient times input knows no stabiliser
    monkeypatch.setitem(_explain_text.PRESETS, composite, functools.partial(_explain_text.PRESETS[composite], 0.0))
    file, out = tmp_path / "goal.txt", tmp_path / "out"
    file.write_text(GOAL, encoding="utf-8")
    # The longer texts make it be padded. In batches of two, the last one is filled up.
    texts = ["many words " * 30, "the phone " * 9, file]
    options = ["--composite", composite, "--batch", batch, "--target", "sports"]
    status, *_ = run(*texts, "--out", out, *options, *(["--contrast", rival] if rival else []))
    assert status == 0
    document, relevance = result(out / "goal")
    assert document["contrast"] == rival

    text = split_text(GOAL, 40)
    words = jnp.asarray(tensors["bert.embeddings.word_embeddings.weight"])[text.ids]
    positions = jnp.asarray(tensors["bert.embeddings.position_embeddings.weight"])[: len(text.ids)]
    types = jnp.asarray(tensors["bert.embeddings.token_type_embeddings.weight"])[0]
    arguments = (words, positions, types)
    head = model.variables["params"]["head"]

    def explained(*arguments: jax.Array) -> jax.Array:
        logits = pooled(detach.Steps(method), tensors, head, *arguments)
        return logits[1] - (logits[2] if rival else 0.0)

    gradients = jax.grad(explained, argnums=(0, 1, 2))(*arguments)
    want = [np.asarray(a * g) for a, g in zip(arguments, gradients, strict=True)]
    scale = np.abs(want[0]).max()
    assert relevance.shape == (len(text.ids), HIDDEN)
    np.testing.assert_allclose(relevance, want[0], atol=1e-4 * scale)
    np.testing.assert_allclose([t["position"] for t in document["tokens"]], want[1].sum(-1), atol=1e-3 * scale)
    summed = document["relevance"]
    np.testing.assert_allclose(summed["output"], explained(*arguments), rtol=1e-4)
    np.testing.assert_allclose(summed["words"], want[0].sum(), atol=1e-3 * scale)
    np.testing.assert_allclose(summed["types"], want[2].sum(), atol=1e-3 * scale)


def test_what_relevance_starts_with() -> None:
    logits = jnp.array([3.0, -1.0, 0.5])
    start = _explain_text._start
    np.testing.assert_allclose(start(jnp.array(0), None, False)(logits), [3, 0, 0])
    np.testing.assert_allclose(start(jnp.array(0), 1, False)(logits), [3, 1, 0])
    # the margins 4 and 2.5, weighed by exp(-margin): what speaks for a rival counts against the class
    weights = np.exp([-4, -2.5]) / np.exp([-4, -2.5]).sum()
    np.testing.assert_allclose(start(jnp.array(0), None, True)(logits), [3, *(-logits[1:] * weights)], rtol=1e-5)


def test_what_is_printed_and_written(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, said, errors = run(GOAL, "the phone has a chip", "--out", out, "--ledger")
    assert status == 0
    assert not errors
    names = ["A_late_goal_of", "the_phone_has_a"]
    assert {p.name for p in out.iterdir()} == {*names, "explanation.html"}
    assert not re.search("\x1b", said)
    for name in names:
        document, relevance = result(out / name)
        assert f"{name}: predicted" in said
        by_token = np.array([t["relevance"] for t in document["tokens"]])
        np.testing.assert_allclose(by_token, relevance.sum(-1), atol=1e-6)
        assert sum(w["relevance"] for w in document["words"]) == pytest.approx(by_token.sum(), abs=1e-6)
        assert document["target"] == max(document["probabilities"], key=document["probabilities"].get)
        assert sum(document["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        # the last line of the table and the ledger say the same as the numbers
        total = sum(document["relevance"][part] for part in ("words", "positions", "types"))
        assert re.search(rf"output to input +{document['relevance']['output']:.3f} +{total:.3f} ", said)
    texts = [w["text"] for w in result(out / names[0])[0]["words"] if not w["special"]]
    assert " ".join(texts) == "A late goal of the striker , & < b > the < / b > bank ' s shares"
    for row in ("pooling and head", "layer 0", "embeddings", "of which words", "positions", "text type"):
        assert re.search(rf"^ *{row} ", said, re.MULTILINE)
    assert "layers_0/attention/softmax" in said  # --ledger
    assert re.search(r"\+\+\+\w", said)
    number = r"(-?\d+\.\d{3})"
    rows = re.findall(rf"^(pooling and head|layer \d|embeddings) +{number} +{number} +\S+ % *(.*)$", said, re.MULTILINE)
    assert len(rows) == len(names) * (2 + LAYERS)
    for (_, _, handed, _), (block, arrived, _, _) in itertools.pairwise(rows):
        assert handed == arrived or block == "pooling and head"
    for _, arrived, handed, lost in rows:
        named = sum(map(float, re.findall(r"[+-]\d+\.\d{3}", lost)))
        assert float(arrived) - float(handed) == pytest.approx(named, abs=6e-3)  # shares below 0.1 % are not listed
        assert "unnamed" not in lost
    page = (out / "explanation.html").read_text(encoding="utf-8")
    read = Reader(page)
    assert GOAL in read.text.replace("\n", " ")
    numbers = [float(attributes["data-r"] or "") for _, attributes in read.words]
    expected = [w["relevance"] for name in names for w in result(out / name)[0]["words"]]
    np.testing.assert_allclose(numbers, expected, atol=5.1e-5)


def test_colours_on_a_terminal(quick: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    status, said, _ = quick(GOAL, "--out", tmp_path / "out")
    assert status == 0
    assert "\x1b[1;38;5;" in said
    assert "+++" not in said


def test_examples_are_held_out_articles(quick: Run, task: news.News, tmp_path: Path) -> None:
    status, said, _ = quick("--out", tmp_path / "out")
    assert status == 0
    assert re.findall(r"^(\w+-\d+): predicted", said, re.MULTILINE) == ["sports-010", "business-010", "tech-010"]
    assert {a.name for a in task.held_out} >= {"sports-010", "business-010", "tech-010"}
    assert "% of 12 held-out articles right" in said


def test_what_cannot_be_read_is_skipped(quick: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "space.txt").write_text("\u200b\u2003", encoding="utf-8")  # not white, yet without a word
    (tmp_path / "long.txt").write_text("\ufeff" + "goal and match " * 30, encoding="utf-8")
    files = [tmp_path / f"{name}.txt" for name in ("empty", "bytes", "missing", "space", "long")]
    status, said, errors = quick(
        *files, tmp_path, "oneword", "no such file.txt", "\udcff a b", "--out", tmp_path / "out"
    )
    assert status == 1
    for name, reason in (("empty", "empty"), ("bytes", "not a text in UTF-8"), ("missing", "no such file")):
        assert f"skipped {tmp_path / name}.txt: {reason}" in errors
    assert f"skipped {tmp_path}: this is a folder" in errors
    assert "skipped oneword: no such file; a text of one word" in errors
    assert "skipped no such file.txt: no such file" in errors
    assert "a b: not a text in UTF-8" in errors
    assert "skipped space: there is no word in it" in errors
    assert "skipped 8 of 9 texts" in errors
    assert "long: 82 of its 122 tokens are cut off (--tokens 40)" in errors
    assert "... 82 more tokens were not read" in said
    assert result(tmp_path / "out" / "long")[0]["tokens_cut"] == 82


def test_texts_of_one_name_get_folders_of_their_own(quick: Run, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for folder in ("a", "b"):
        (tmp_path / folder / "same.txt").write_text(f"the goal {folder}")
    files = [tmp_path / folder / "same.txt" for folder in ("a", "b")]
    assert quick(*files, "in ../.. the", "--out", tmp_path / "out")[0] == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "explanation.html",
        "in_.._.._the",
        "same",
        "same-2",
    ]


def test_a_contrast_with_the_predicted_class_skips_the_text(quick: Run, tmp_path: Path) -> None:
    texts = ["goal match striker goal match", "bank shares profit bank shares"]
    status, said, errors = quick(*texts, "--contrast", "sport", "--out", tmp_path / "out")
    assert status == 1
    assert "skipped goal_match_striker_goal: predicted as sports, the class of --contrast" in errors
    assert "explained business and not sports" in said
    status, _, errors = quick(texts[0], "--contrast", "1", "--out", tmp_path / "none")
    assert status == 2
    assert "name another, or a --target" in errors
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "sprot"], "is called 'sprot'. Classes: business, sports, tech."),
        (["--target", "3"], "Classes: business"),
        (["--target", "s"], "or more than one"),
        (["--target", ""], "Classes: business"),
        (["--target", "tech", "--contrast", "TECH"], "are the same class, tech"),
        (["--contrast", "tech", "--contrastive"], "give one of them"),
        (["--composite", "gamma"], "invalid choice"),
        (["--batch", "0"], "at least 1"),
    ],
)
def test_bad_options_say_what_to_do(quick: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    out = tmp_path / "out"
    status, _, errors = quick(GOAL, "--out", out, *arguments)
    assert status == 2
    assert message in errors
    assert "training" not in errors, "found out before any work is done"
    assert not out.exists(), "nothing half written"


@pytest.mark.parametrize(
    ("tokens", "message"), [("65", "reads at most 64"), ("7", "at least 8"), ("x", "whole number")]
)
def test_bad_number_of_tokens(
    task: news.News, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokens: str, message: str
) -> None:
    monkeypatch.setattr(_explain_text, "load_news", lambda: task)
    try:
        status = main(["explain-text", GOAL, "--no-cache", "--tokens", tokens])
    except SystemExit as stop:
        status = int(stop.code or 0)
    assert status == 2
    assert message in capsys.readouterr().err


def test_nothing_to_explain(quick: Run, tmp_path: Path) -> None:
    for texts, message in (
        (["   "], "none of the texts could be read"),
        (["\u200b \u200b"], "none of the texts has a word"),
    ):
        status, _, errors = quick(*texts, "--out", tmp_path / "out")
        assert status == 2
        assert message in errors
        assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(quick: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").write_text("")
    status, _, errors = quick(GOAL, "--out", tmp_path / "taken")
    assert status == 2
    assert f"cannot write to the output folder {tmp_path / 'taken'}" in errors
    (tmp_path / "out" / "A_late_goal_of").mkdir(parents=True)
    (tmp_path / "out" / "A_late_goal_of" / "tokens.json").mkdir()  # found out while writing
    status, _, errors = quick(GOAL, "--out", tmp_path / "out")
    assert status == 2
    assert "cannot write to" in errors
    left = {p.name for p in (tmp_path / "out").rglob("*")}
    assert left == {"A_late_goal_of", "relevance.npy", "tokens.json"}, "no page, and no temporary file"


@pytest.mark.parametrize("error", [WeightFileError, bert.ModelConfigError, news.NewsError, ModuleNotFoundError])
def test_damaged_or_missing_packages(quick: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    def broken() -> None:
        raise error("install it anew: pip install this")

    monkeypatch.setattr(_explain_text, "load_news", broken)
    status, _, errors = quick(GOAL, "--out", tmp_path / "out")
    assert status == 2
    assert errors == "jaxlrp: error: install it anew: pip install this\n"
    assert not (tmp_path / "out").exists()


# --- the real thing -------------------------------------------------------------------------------

PACKAGES = ("rich", "safetensors", "tokenizers", news.PACKAGE, minilm.PACKAGE)
needs_packages = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, PACKAGES)), reason=f"needs {', '.join(PACKAGES)}"
)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@needs_packages
@pytest.mark.heavy
def test_sentences_that_mean_the_same_have_similar_vectors() -> None:
    module, variables, tokenise = minilm.load_minilm()
    texts = [
        "A man is eating food.",
        "A man is eating a piece of bread.",
        "The markets fell after the central bank met.",
    ]
    ids, mask = minilm.pad([tokenise(text, 20) for text in texts], 20)
    hidden = jax.jit(module.apply)(variables, ids, mask)
    food, bread, markets = np.asarray(minilm.mean_over_tokens(jnp.asarray(hidden), jnp.asarray(mask)))
    assert cosine(food, bread) == pytest.approx(0.7553, abs=2e-3)  # published with the model
    assert abs(cosine(food, markets)) < 0.15


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train on fewer articles, a third of the encoding: the head is nearly as good."""
    monkeypatch.setattr(news, "TRAINED", 60)
    monkeypatch.setattr(news, "HELD_OUT", 30)


def strongest(document: dict[str, Any], count: int) -> set[str]:
    words = sorted(document["words"], key=lambda w: -w["relevance"])
    return {w["text"].lower() for w in words[:count]}


@needs_packages
@pytest.mark.heavy
def test_explains_news(few: None, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {
        "sports": "The striker scored a late goal in the cup final after the coach had changed his team at half time.",
        "business": "The bank raised its interest rates and its shares fell as profits were lower than expected.",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    files = [str(tmp_path / f"{name}.txt") for name in texts]
    options = ["--cache", str(cache), "--out"]
    assert main(["explain-text", *files, *options, str(tmp_path / "own")]) == 0
    accuracy = re.search(r"head: ([\d.]+) % of 150", capsys.readouterr().out)
    assert accuracy
    assert float(accuracy[1]) > 92
    expected = {
        "sports": {"striker", "goal", "cup", "coach", "team", "scored", "final"},
        "business": {"bank", "interest", "rates", "shares", "profits"},
    }
    for name, words in expected.items():
        document, _ = result(tmp_path / "own" / name)
        assert document["target"] == name
        assert len(strongest(document, 5) & words) >= 4
    # and the held-out articles, whose head is now recalled
    assert main(["explain-text", *options, str(tmp_path / "articles"), "--tokens", "128"]) == 0
    output, errors = capsys.readouterr()
    assert "training" not in errors
    for name in ("sports", "business", "tech"):
        assert re.search(rf"^{name}-\d+: predicted {name}", output, re.MULTILINE)


@needs_packages
@pytest.mark.heavy
def test_words_that_speak_most_matter_most(few: None, cache: Path, tmp_path: Path) -> None:
    """A text without its most relevant fifth loses most of its logit; without its least relevant fifth it gains.

    Words are taken out by the mask: others keep their positions, and nothing strange stands in their place.
    """
    task = news.load_news()
    model = news.classify_news(task, cache, each, lambda line: None)
    articles = [a for a in task.held_out if a.name.startswith("sports")][:8]
    files = [tmp_path / f"{article.name}.txt" for article in articles]
    for file, article in zip(files, articles, strict=True):
        file.write_text(article.text, encoding="utf-8")
    options = ["--cache", cache, "--target", "sports", "--tokens", "128", "--out", tmp_path / "out"]
    assert main(["explain-text", *map(str, [*files, *options])]) == 0

    ids, mask = minilm.pad([task.tokenise(a.text, 128) for a in articles], 128)
    run = jax.jit(model.module.apply)

    def logits(sign: int) -> float:
        kept = mask.copy()
        for row, article in enumerate(articles):
            scores = result(tmp_path / "out" / article.name)[1].sum(-1)[1:-1]
            out = np.argsort(sign * scores)[: abs(sign) * len(scores) // 5]
            kept[row, 1 + out] = 0
        return float(np.asarray(run(model.variables, ids, kept))[:, task.classes.index("sports")].mean())

    whole, most, least = logits(0), logits(-1), logits(1)
    assert whole > 2
    assert most < 0.6 * whole
    assert least > 1.1 * whole
