"""Pictures: the sign survives, zero is neutral, files are whole, bad photos say why."""

from __future__ import annotations

import io
import os
import struct
import sys
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxlrp import plot
from jaxlrp.plot import heatmap, sheet

NEUTRAL = {"bwr": (255, 255, 255), "seismic": (255, 255, 255), "coldnhot": (0, 0, 0)}

SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, max_side=8)
MAPS = hnp.arrays(np.float64, SHAPES, elements=st.floats(-1e300, 1e300))
HEAT = hnp.arrays(np.float64, SHAPES, elements=st.floats(-1, 1))

every_cmap = pytest.mark.parametrize("cmap", plot.COLOUR_MAPS)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return noise that no two places share, as RGB bytes."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def lightness(rgb: np.ndarray) -> np.ndarray:
    """Return CIE L*, 0 to 100, of sRGB bytes along the last axis."""
    value = rgb / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    y = linear @ [0.2126, 0.7152, 0.0722]
    return np.where(y > 0.008856, 116 * np.cbrt(y) - 16, 903.3 * y)


class TestPoolChannels:
    def test_sums_over_channels(self):
        relevance = np.arange(24.0).reshape(2, 4, 3) - 12
        np.testing.assert_array_equal(plot.pool_channels(relevance), relevance.sum(-1))

    def test_copies_a_map_without_channels(self):
        relevance = np.ones((2, 3))
        pooled = plot.pool_channels(relevance)
        pooled[:] = 0
        assert relevance.sum() == 6

    def test_takes_jax_arrays_of_low_precision_and_sums_in_float64(self):
        relevance = jnp.full((2, 2, 3), 257, jnp.bfloat16)  # stored as 256; 3 * 256 is exact
        pooled = plot.pool_channels(relevance)
        assert pooled.dtype == np.float64
        assert (pooled == 768).all()

    @pytest.mark.parametrize("shape", [(5,), (1, 4, 4, 3)])
    def test_a_batch_is_refused_with_advice(self, shape):
        with pytest.raises(ValueError, match=r"one image.*relevance\[0\]"):
            plot.pool_channels(np.zeros(shape))

    def test_not_finite_empty_and_complex_are_refused(self):
        with pytest.raises(ValueError, match="2 of 12 values that are NaN or infinite"):
            plot.pool_channels(np.array([np.nan, np.inf, *range(10)]).reshape(2, 2, 3))
        with pytest.raises(ValueError, match=r"empty: its shape is \(0, 4, 3\)"):
            plot.pool_channels(np.zeros((0, 4, 3)))
        with pytest.raises(ValueError, match=r"must be real.*complex128"):
            plot.pool_channels(np.zeros((2, 2), complex))


class TestNormalise:
    @given(MAPS)
    @example(np.array([[-0.0, -1.0]]))
    def test_bounded_signs_kept_zero_kept(self, relevance):
        heat = plot.normalise(relevance)
        assert np.abs(heat).max() == (1 if relevance.any() else 0)
        assert ((np.sign(heat) == np.sign(relevance)) | (heat == 0)).all()  # underflow may reach 0
        assert not np.signbit(heat[relevance == 0]).any()
        np.testing.assert_array_equal(plot.normalise(-relevance), -heat)

    def test_limit_is_the_new_one_and_what_exceeds_it_is_clipped(self):
        heat = plot.normalise(np.array([[-8.0, -1.0, 0.0, 2.0, 3.0]]), limit=2)
        np.testing.assert_array_equal(heat, [[-1, -0.5, 0, 1, 1]])

    def test_no_overflow_on_the_way(self):
        np.testing.assert_array_equal(plot.normalise([[1e300, -1e300]], limit=1e-300), [[1, -1]])

    def test_percentile_lets_outliers_saturate(self):
        relevance = np.append(np.linspace(-1, 1, 99), 1000.0).reshape(10, 10)
        assert np.abs(plot.normalise(relevance)).max() == 1
        assert np.abs(plot.normalise(relevance)).mean() < 0.02
        heat = plot.normalise(relevance, percentile=95)
        assert np.abs(heat).max() == 1
        assert np.abs(heat).mean() > 0.4

    def test_percentile_of_a_sparse_map_falls_back_to_the_largest(self):
        relevance = np.zeros((10, 10))
        relevance[3, 4] = -5
        assert plot.limit_of(relevance, percentile=90) == 5
        assert plot.normalise(relevance, percentile=90)[3, 4] == -1

    def test_all_zero_stays_zero(self):
        assert not plot.normalise(np.zeros((3, 3))).any()
        assert not plot.normalise(np.zeros((3, 3)), percentile=99).any()
        assert plot.limit_of(np.zeros((3, 3))) == 0

    def test_one_limit_for_several_maps(self):
        maps = [np.array([[1.0, -2.0]]), np.array([[4.0, 0.0]])]
        limit = max(plot.limit_of(m) for m in maps)
        assert plot.normalise(maps[0], limit)[0, 1] == -0.5

    def test_errors(self):
        for value in (np.nan, np.inf, -np.inf):
            with pytest.raises(ValueError, match="1 of 4 values that are NaN or infinite"):
                plot.normalise([[1.0, 2.0], [3.0, value]])
        for limit in (0, -1, np.nan, np.inf):
            with pytest.raises(ValueError, match="limit must be a positive, finite number"):
                plot.normalise([[1.0]], limit)
        for percentile in (0, -1, 101, np.nan):
            with pytest.raises(ValueError, match="percentile must be above 0 and at most 100"):
                plot.normalise([[1.0]], percentile=percentile)
        with pytest.raises(ValueError, match="either limit or percentile"):
            plot.normalise([[1.0]], 1, percentile=99)
        with pytest.raises(ValueError, match=r"must be \[H, W\].*pool_channels"):
            plot.normalise(np.ones((2, 2, 3)))


class TestBoxSmooth:
    def test_is_the_mean_of_the_square_cut_off_at_the_edges(self):
        values = np.random.default_rng(0).normal(size=(6, 5))
        expected = [[values[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3].mean() for x in range(5)] for y in range(6)]
        np.testing.assert_allclose(plot.box_smooth(values, 2), expected, rtol=1e-12)

    @given(HEAT, st.integers(0, 12))
    @example(np.full((3, 3), 0.1), 1)  # three tenths make 0.30000000000000004
    def test_stays_in_range(self, heat, radius):
        smooth = plot.box_smooth(heat, radius)
        assert heat.min() <= smooth.min()
        assert smooth.max() <= heat.max()

    def test_extremes_of_radius(self):
        values = np.arange(12.0).reshape(3, 4)
        np.testing.assert_array_equal(plot.box_smooth(values, 0), values)
        np.testing.assert_allclose(plot.box_smooth(values, 10**9), np.full((3, 4), 5.5))
        with pytest.raises(ValueError, match="radius must be 0 or more"):
            plot.box_smooth(values, -1)


class TestUpscale:
    def test_nearest_repeats_the_cells(self):
        cells = np.random.default_rng(0).normal(size=(2, 3))
        expected = cells.repeat(4, axis=0).repeat(5, axis=1)
        np.testing.assert_array_equal(plot.upscale(cells, (8, 15), "nearest"), expected)

    def test_linear_by_hand(self):
        np.testing.assert_allclose(plot.upscale([[0.0, 1.0]], (1, 8)), [[0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]])

    @given(HEAT, st.integers(0, 20), st.integers(0, 20), st.sampled_from(["linear", "nearest"]))
    @example(np.full((3, 3), 0.1), 20, 20, "linear")
    def test_range_and_symmetry(self, heat, more_rows, more_columns, method):
        size = heat.shape[0] + more_rows, heat.shape[1] + more_columns
        large = plot.upscale(heat, size, method)
        assert large.shape == size
        assert heat.min() <= large.min()
        assert large.max() <= heat.max()
        np.testing.assert_array_equal(plot.upscale(-heat, size, method), -large)
        if method == "linear":  # nearest has to prefer one of two cells where it meets their edge
            mirrored = plot.upscale(heat[::-1, ::-1], size, method)[::-1, ::-1]
            np.testing.assert_allclose(mirrored, large, atol=1e-12)

    @pytest.mark.parametrize("method", ["linear", "nearest"])
    def test_own_size_changes_nothing(self, method):
        values = np.random.default_rng(0).normal(size=(7, 11))
        np.testing.assert_array_equal(plot.upscale(values, (7, 11), method), values)

    def test_errors(self):
        with pytest.raises(ValueError, match=r"shape \(4, 4\) to the smaller \(8, 3\)"):
            plot.upscale(np.zeros((4, 4)), (8, 3))
        with pytest.raises(ValueError, match='"linear" or "nearest", not \'cubic\''):
            plot.upscale(np.zeros((4, 4)), (8, 8), "cubic")  # pyright: ignore[reportArgumentType]


class TestDiverging:
    @every_cmap
    def test_zero_is_exactly_neutral(self, cmap):
        rgb = plot.diverging([[0.0, -0.0], [1.0, -1.0]], cmap)
        assert tuple(rgb[0, 0]) == tuple(rgb[0, 1]) == NEUTRAL[cmap]
        assert NEUTRAL[cmap] not in {tuple(rgb[1, 0]), tuple(rgb[1, 1])}

    @every_cmap
    def test_arms_run_from_neutral_to_their_last_colour(self, cmap):
        negative, positive = heatmap._ARMS[cmap]
        rgb = plot.diverging([[-1.0, 1.0, -0.001, 0.001]], cmap)[0].tolist()
        assert rgb[0] == list(bytes.fromhex(negative[-1][1:]))
        assert rgb[1] == list(bytes.fromhex(positive[-1][1:]))
        assert rgb[2] == rgb[3] == list(NEUTRAL[cmap])  # less than half a step

    @every_cmap
    def test_red_is_for_and_blue_against(self, cmap):
        rgb = plot.diverging([np.linspace(-1, 1, 201)], cmap)[0].astype(int)
        negative, positive = rgb[:95], rgb[106:]  # all but the palest
        assert (positive[:, 0] > positive[:, 2]).all()
        assert (negative[:, 2] > negative[:, 0]).all()

    @every_cmap
    def test_equally_strong_looks_equally_strong(self, cmap):
        """Lightness runs in one direction along each arm, and alike on both."""
        steps = np.linspace(0, 1, 256)
        negative, positive = (lightness(plot.diverging([s * steps], cmap)[0]) for s in (-1, 1))
        assert np.abs(negative - positive).max() < 4
        for arm in (negative, positive):
            direction = np.sign(arm[-1] - arm[0])
            assert (direction * np.diff(arm) > -0.35).all()  # rounding to bytes moves L* by as much
            assert np.abs(arm[-1] - arm[0]) > 60

    @every_cmap
    @given(heat=HEAT)
    def test_every_value_depends_on_itself_alone(self, cmap, heat):
        rgb = plot.diverging(heat, cmap)
        assert rgb.shape == (*heat.shape, 3)
        assert rgb.dtype == np.uint8
        np.testing.assert_array_equal(rgb[::-1], plot.diverging(heat[::-1], cmap))
        assert (rgb[heat == 0] == NEUTRAL[cmap]).all()

    def test_result_may_be_written_to(self):
        before = plot.diverging([[1.0]])
        plot.diverging([[1.0]])[:] = 7
        np.testing.assert_array_equal(plot.diverging([[1.0]]), before)

    def test_errors(self):
        with pytest.raises(ValueError, match=r"in \[-1, 1\].*size is 2;.*normalise first"):
            plot.diverging([[0.0, -2.0]])
        with pytest.raises(ValueError, match="'jet'; known are bwr, seismic, coldnhot"):
            plot.diverging([[0.0]], "jet")
        with pytest.raises(ValueError, match="NaN"):
            plot.diverging([[np.nan]])

    def test_rounding_beyond_one_is_forgiven(self):
        np.testing.assert_array_equal(plot.diverging([[1 + 1e-7]]), plot.diverging([[1.0]]))


class TestOverlay:
    @every_cmap
    def test_without_relevance_it_is_grey(self, cmap):
        for rgb in (
            plot.overlay(picture(5, 6), np.zeros((5, 6)), cmap=cmap),
            plot.overlay(picture(5, 6), np.ones((5, 6)), alpha=0, cmap=cmap),
        ):
            assert (rgb == rgb[..., :1]).all()
            assert len(np.unique(rgb)) > 10  # and the photo is still there

    @every_cmap
    def test_full_relevance_at_full_alpha_hides_the_photo(self, cmap):
        heat = np.array([[1.0, -1.0]])
        np.testing.assert_array_equal(plot.overlay(picture(1, 2), heat, alpha=1, cmap=cmap), plot.diverging(heat, cmap))

    @every_cmap
    @pytest.mark.parametrize("sign", [-1, 1])
    def test_opacity_grows_with_relevance(self, cmap, sign):
        """A black and a white photo differ by what shines through."""
        heat = sign * np.linspace(0, 1, 21)[np.newaxis]
        black, white = (
            plot.overlay(np.full((1, 21, 3), value, np.uint8), heat, cmap=cmap).astype(int) for value in (0, 255)
        )
        through = (white - black)[0, :, 0]
        assert (np.diff(through) < 0).all()
        assert 0 < through[-1] < through[0] / 5

    @every_cmap
    def test_by_hand(self, cmap):
        """Half the relevance: half opaque, in the colour three quarters out."""
        rgb = plot.overlay(np.full((1, 2, 3), 100, np.uint8), [[-0.5, 0.5]], 1, cmap)
        faded = (100 + NEUTRAL[cmap][0]) / 2
        expected = (faded + plot.diverging([[-0.75, 0.75]], cmap)) / 2
        assert np.abs(rgb - expected).max() <= 1

    def test_photo_is_not_changed(self):
        photo = picture(4, 4)
        photo.flags.writeable = False
        plot.overlay(photo, np.ones((4, 4)))

    def test_errors(self):
        with pytest.raises(ValueError, match=r"\(2, 2\) but the photo \(4, 4\).*upscale\(heat"):
            plot.overlay(picture(4, 4), np.zeros((2, 2)))
        with pytest.raises(ValueError, match=r"photo must be uint8.*float64 of shape \(4, 4, 3\)"):
            plot.overlay(np.zeros((4, 4, 3)), np.zeros((4, 4)))
        with pytest.raises(ValueError, match=r"photo must be uint8.*shape \(4, 4\)"):
            plot.overlay(np.zeros((4, 4), np.uint8), np.zeros((4, 4)))
        with pytest.raises(ValueError, match=r"alpha must be between 0 and 1, not 1\.5"):
            plot.overlay(picture(4, 4), np.zeros((4, 4)), alpha=1.5)
        with pytest.raises(ValueError, match="known are"):
            plot.overlay(picture(4, 4), np.zeros((4, 4)), cmap="")


class TestSavePng:
    def test_round_trip(self, tmp_path):
        rgb = picture(9, 7)
        plot.save_png(tmp_path / "a.png", rgb[:, ::-1])  # not contiguous
        np.testing.assert_array_equal(plot.load_photo(tmp_path / "a.png"), rgb[:, ::-1])
        assert os.listdir(tmp_path) == ["a.png"]

    def test_replaces_an_older_file(self, tmp_path):
        for seed in (0, 1):
            plot.save_png(str(tmp_path / "a.PNG"), picture(3, 3, seed))
        np.testing.assert_array_equal(plot.load_photo(tmp_path / "a.PNG"), picture(3, 3, 1))

    @pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
    @pytest.mark.parametrize("older", [None, b"older"])
    def test_failure_leaves_nothing_half_written(self, tmp_path, monkeypatch, failure, older):
        target = tmp_path / "a.png"
        if older:
            target.write_bytes(older)

        def fail(source, destination):
            assert Path(source).parent == tmp_path  # else the replacement would not be atomic
            raise failure

        monkeypatch.setattr(heatmap.os, "replace", fail)
        with pytest.raises(type(failure)):
            plot.save_png(target, picture(3, 3))
        assert os.listdir(tmp_path) == (["a.png"] if older else [])
        assert not older or target.read_bytes() == older

    def test_a_folder_in_the_way_leaves_nothing_behind(self, tmp_path):
        (tmp_path / "a.png").mkdir()
        with pytest.raises(OSError, match=r"a\.png"):
            plot.save_png(tmp_path / "a.png", picture(3, 3))
        assert os.listdir(tmp_path) == ["a.png"]

    @pytest.mark.skipif(os.name != "posix", reason="permission bits")
    def test_others_may_read_it_as_the_umask_says(self, tmp_path):
        before = os.umask(0o022)
        try:
            plot.save_png(tmp_path / "a.png", picture(3, 3))
        finally:
            os.umask(before)
        assert (tmp_path / "a.png").stat().st_mode & 0o777 == 0o644

    def test_errors(self, tmp_path):
        with pytest.raises(ValueError, match=r"a\.jpg: .*must end in \.png"):
            plot.save_png(tmp_path / "a.jpg", picture(3, 3))
        with pytest.raises(FileNotFoundError, match=r"the folder .*missing does not exist"):
            plot.save_png(tmp_path / "missing" / "a.png", picture(3, 3))
        with pytest.raises(ValueError, match="picture must be uint8"):
            plot.save_png(tmp_path / "a.png", np.zeros((3, 3, 3)))
        assert not os.listdir(tmp_path)


class TestContactSheet:
    @pytest.mark.parametrize("rows", [1, 3, 20])
    @pytest.mark.parametrize("columns", [2, 5, 8])
    def test_tiles_stand_whole_in_a_regular_grid(self, rows, columns):
        height, width = 150, 160
        tiles = [
            [np.full((height, width, 3), (200, 10 * r, 20 * c), np.uint8) for c in range(columns)] for r in range(rows)
        ]
        page = plot.contact_sheet(
            tiles,
            [f"a rule with a long name {c}" for c in range(columns)],
            [f"a class with a long name {r}" for r in range(rows)],
            title="heading " * 50,
            caption="caption",
            cmap="coldnhot",  # its colours are none of the tiles'
        )
        rank = np.array([1 << 16, 1 << 8, 1])
        values, first, counts = np.unique(page @ rank, return_index=True, return_counts=True)
        corners = np.zeros((rows, columns, 2), int)
        for r, row in enumerate(tiles):
            for c, tile in enumerate(row):
                found = np.searchsorted(values, tile[0, 0] @ rank)
                y, x = divmod(first[found], page.shape[1])
                corners[r, c] = y, x
                np.testing.assert_array_equal(page[y : y + height, x : x + width], tile)
                assert counts[found] == height * width
        assert (np.ptp(corners[..., 0], axis=1) == 0).all()  # rows are level
        assert (np.ptp(corners[..., 1], axis=0) == 0).all()  # columns are plumb
        steps = np.unique(np.diff(corners[..., 1])), np.unique(np.diff(corners[..., 0], axis=0))
        assert len(steps[0]) == 1
        assert steps[0][0] > width
        assert rows == 1 or (steps[1] == steps[0] - width + height).all()
        border = np.concatenate([page[:12].ravel(), page[-12:].ravel(), page[:, :12].ravel()])
        assert (border == 255).all()
        assert (page[:, -12:] == 255).all()

    def test_small_tiles_are_enlarged_by_a_whole_factor(self):
        tile = picture(28, 32)
        page = plot.contact_sheet([[tile, tile]], ["", ""], [""], cmap=None)
        large = tile.repeat(5, axis=0).repeat(5, axis=1)
        windows = [
            (y, x)
            for y, x in np.argwhere((page == large[0, 0]).all(-1))
            if np.array_equal(page[y : y + 140, x : x + 160], large)
        ]
        assert len(windows) == 2

    def test_a_long_title_keeps_to_its_own_column(self):
        white = np.full((150, 150, 3), 255, np.uint8)
        title = "Bottomless" * 30 + " and more " * 30
        page = plot.contact_sheet([[white] * 3], ["", title, ""], [""], cmap=None)
        plain = plot.contact_sheet([[white] * 3], ["", "", ""], [""], cmap=None)
        assert page.shape[1] == plain.shape[1]
        hairlines = np.nonzero((page[-60] != 255).any(-1))[0]  # left and right of three tiles
        assert len(hairlines) == 6
        top = np.nonzero((page[:, hairlines[0] + 75] != 255).any(-1))[0][0]
        ink = np.nonzero((page[: top - 1] != 255).any((0, 2)))[0]
        assert hairlines[2] <= ink.min()
        assert ink.max() <= hairlines[3]
        assert np.ptp(ink) > 100  # shortened, not dropped

    def test_row_titles_take_room_only_where_there_are_any(self):
        tiles = [[picture(150, 150)]] * 2
        without = plot.contact_sheet(tiles, ["a"], ["", ""])
        short = plot.contact_sheet(tiles, ["a"], ["", "cat"])
        long = plot.contact_sheet(tiles, ["a"], ["", "cat " * 100])
        endless = plot.contact_sheet(tiles, ["a"], ["", "cat" * 1000])
        assert without.shape[1] < short.shape[1] < long.shape[1]
        assert max(long.shape[1], endless.shape[1]) < without.shape[1] + 180

    @every_cmap
    def test_legend_shows_the_colours_from_end_to_end(self, cmap):
        grey = np.full((150, 150, 3), 128, np.uint8)
        with_legend = plot.contact_sheet([[grey] * 2], ["", ""], [""], cmap=cmap)
        without = plot.contact_sheet([[grey] * 2], ["", ""], [""], cmap=None)
        assert with_legend.shape[0] > without.shape[0]
        legend = with_legend[without.shape[0] - 5 :]
        negative, neutral, positive = plot.diverging([[-1.0, 0.0, 1.0]], cmap)[0]
        bars = [row for row in legend if (row == negative).all(-1).any() and (row == positive).all(-1).any()]
        assert len(bars) > 5
        left, right = (np.nonzero((bars[0] == end).all(-1))[0] for end in (negative, positive))
        assert left.min() < right.max()
        assert (left.min() + right.max()) % 2 == 0
        np.testing.assert_array_equal(bars[0][(left.min() + right.max()) // 2], neutral)

    def test_margins_are_equal(self):
        tile = np.zeros((150, 150, 3), np.uint8)
        page = plot.contact_sheet([[tile] * 3] * 2, [""] * 3, ["", ""], cmap=None)
        ys, xs = np.nonzero((page == 0).all(-1))
        height, width = page.shape[:2]
        assert xs.min() == width - 1 - xs.max() == ys.min() == height - 1 - ys.max() > 12

    def test_an_empty_place_stays_paper(self):
        page = plot.contact_sheet([[picture(150, 150), None]], ["", ""], [""], cmap=None)
        assert (page[:, -160:] == 255).all()

    def test_other_letters_are_spelled_out(self):
        def page(title):
            return plot.contact_sheet([[picture(150, 300)]], [title], [""])

        np.testing.assert_array_equal(
            page("α2β1 → λ ≥ −1 – Größe, café"),
            page("alpha2beta1 -> lambda >= -1 - Grosse, cafe"),
        )
        np.testing.assert_array_equal(page("猫\tA"), page("? A"))

    @pytest.mark.parametrize(
        ("text", "lines", "expected"),
        [
            ("", 2, []),
            (" \n ", 2, []),
            ("cat", 2, ["cat"]),
            ("tabby cat", 2, ["tabby cat"]),
            ("Egyptian cat", 2, ["Egyptian", "cat"]),
            ("Egyptian cat", 1, ["Egyptian…"]),
            ("EpsilonGammaBox", 2, ["EpsilonGa…"]),
            ("block4_conv3_relu", 3, ["block4_", "conv3_relu"]),
            ("Gamma(gamma=0.25)", 2, ["Gamma(", "gamma=0.2…"]),
            ("/images/cats/a.png", 2, ["/images/", "cats/a.png"]),
            ("a very, very long class\n0.63", 3, ["a very,", "very long…", "0.63"]),
            ("name\n0.63\nlast", 2, ["name", "0.63…"]),
            ("name\n0.63\nlast", 1, ["name…"]),
        ],
    )
    def test_titles_break_and_shorten(self, text, lines, expected):
        class Monospaced:
            def getlength(self, text):
                return len(text)

        fitted = sheet._fit(text, 10, lines, Monospaced())  # pyright: ignore[reportArgumentType]
        assert [line.text for line in fitted] == expected

    @given(st.text(max_size=60), st.integers(1, 3))
    def test_any_title_fits_its_room(self, text, lines):
        font = sheet._font(14)
        fitted = sheet._fit(text, 80, lines, font)
        assert len(fitted) <= lines
        assert all(font.getlength(line.text) <= 80 for line in fitted)

    def test_errors(self):
        tile = picture(8, 8)
        with pytest.raises(ValueError, match="2 rows have 1 row titles"):
            plot.contact_sheet([[tile], [tile]], ["a"], ["a"])
        with pytest.raises(ValueError, match="row 1 has 2 tiles, but there are 1 column titles"):
            plot.contact_sheet([[tile], [tile, tile]], ["a"], ["a", "b"])
        with pytest.raises(ValueError, match=r"row 0, column 1 has \(8, 9\) pixels.*\(8, 8\)"):
            plot.contact_sheet([[tile, picture(8, 9)]], ["a", "b"], ["a"])
        with pytest.raises(ValueError, match=r"row 0, column 0 must be uint8.*float64"):
            plot.contact_sheet([[tile / 255]], ["a"], ["a"])  # pyright: ignore[reportArgumentType]
        for rows, columns, titles in (([], [], []), ([[None]], ["a"], ["a"]), ([[]], [], ["a"])):
            with pytest.raises(ValueError, match="at least one tile"):
                plot.contact_sheet(rows, columns, titles)
        with pytest.raises(ValueError, match="known are bwr"):
            plot.contact_sheet([[tile]], ["a"], ["a"], cmap="jet")


def encode(image: PIL.Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


LOSSLESS = {
    "PNG": {},
    "BMP": {},
    "TIFF": {},
    "PPM": {},
    "WEBP": {"lossless": True},
    "JPEG2000": {"irreversible": False},
}

# What a camera stores for each EXIF orientation of a picture that is seen upright.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


class TestLoadPhoto:
    @pytest.fixture
    def load(self, tmp_path):
        """Return a function that writes an image or bytes to a file and loads that."""

        def load(content, format="PNG", name="photo", **options):
            if not isinstance(content, bytes):
                content = encode(content, format, **options)
            (tmp_path / name).write_bytes(content)
            return plot.load_photo(tmp_path / name)

        return load

    @pytest.mark.parametrize("format", LOSSLESS)
    def test_formats_whatever_the_name_says(self, load, format):
        rgb = picture(20, 30)
        loaded = load(PIL.Image.fromarray(rgb), format, "photo.jpg", **LOSSLESS[format])
        np.testing.assert_array_equal(loaded, rgb)
        assert loaded.dtype == np.uint8
        assert loaded.flags.c_contiguous
        assert loaded.flags.writeable

    def test_jpeg(self, load):
        smooth = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
        loaded = load(PIL.Image.fromarray(smooth), "JPEG", quality=95)
        assert np.abs(loaded.astype(int) - smooth).max() < 12

    def test_grey(self, load):
        grey = picture(8, 9)[..., 0]
        expected = np.repeat(grey[..., np.newaxis], 3, axis=-1)
        np.testing.assert_array_equal(load(PIL.Image.fromarray(grey)), expected)
        bilevel = PIL.Image.fromarray(grey).convert("1", dither=PIL.Image.Dither.NONE)
        np.testing.assert_array_equal(load(bilevel), (expected > 127) * np.uint8(255))

    @pytest.mark.parametrize("format", ["PNG", "TIFF"])
    def test_grey_of_16_bits(self, load, format):
        deep = np.array([[0, 256, 257, 32768, 65278, 65535]], np.uint16)
        loaded = load(PIL.Image.fromarray(deep), format)
        assert loaded.tolist() == [[[v] * 3 for v in (0, 1, 1, 128, 254, 255)]]

    def test_colour_of_16_bits(self, load):
        """Pillow cannot write it, so the file is put together by hand."""
        pixels = np.array([[[65535, 32896, 0], [257, 514, 65535]]], ">u2")
        loaded = load(
            b"\x89PNG\r\n\x1a\n"
            + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
            + png_chunk(b"IDAT", zlib.compress(b"\0" + pixels.tobytes()))
            + png_chunk(b"IEND", b"")
        )
        assert loaded.tolist() == [[[255, 128, 0], [1, 2, 255]]]

    def test_palette(self, load):
        rgb = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], np.uint8)
        indexed = PIL.Image.fromarray(rgb).quantize(4)
        assert indexed.mode == "P"
        for format in ("PNG", "GIF"):
            np.testing.assert_array_equal(load(indexed, format), rgb)

    def test_palette_with_a_transparent_colour(self, load):
        indexed = PIL.Image.fromarray(np.array([[0, 1]], np.uint8), "P")
        indexed.putpalette([255, 0, 0, 0, 0, 255])
        for format in ("PNG", "GIF"):
            loaded = load(indexed, format, transparency=1)
            assert loaded.tolist() == [[[255, 0, 0], [255, 255, 255]]]

    def test_alpha_lies_over_white(self, load):
        rgba = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 51]]], np.uint8)
        expected = [[[200, 0, 0], [255, 255, 255], [244, 204, 204]]]
        for format in ("PNG", "TIFF"):
            assert load(PIL.Image.fromarray(rgba), format).tolist() == expected
        grey_alpha = PIL.Image.fromarray(rgba[..., [0, 3]], "LA")
        assert load(grey_alpha)[0, :, 0].tolist() == [200, 255, 244]
        keyed = PIL.Image.fromarray(rgba[..., :3])
        assert (load(keyed, transparency=(200, 0, 0)) == 255).all()

    def test_cmyk(self, load):
        red = PIL.Image.new("RGB", (16, 16), (255, 0, 0)).convert("CMYK")
        loaded = load(red, "JPEG", quality=95)
        assert np.abs(loaded.astype(int) - [255, 0, 0]).max() < 10

    @pytest.mark.parametrize("orientation", STORED)
    @pytest.mark.parametrize("format", ["PNG", "TIFF", "JPEG", "WEBP"])
    def test_orientation(self, load, orientation, format):
        blocks = np.array([[0, 50, 100], [150, 200, 250]], np.uint8)
        upright = np.repeat(blocks.repeat(16, 0).repeat(16, 1)[..., np.newaxis], 3, axis=-1)
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        stored = PIL.Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
        loaded = load(stored, format, exif=exif)
        assert loaded.shape == upright.shape
        assert np.abs(loaded.astype(int) - upright).max() < 10

    def test_damaged_exif_is_no_reason_to_refuse(self, load):
        grey = PIL.Image.new("RGB", (8, 8), (90, 90, 90))
        for exif in (b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0garbage", b"Exif\0\0"):
            assert load(grey, "JPEG", exif=exif).shape == (8, 8, 3)

    def test_first_frame_of_an_animation(self, load):
        frames = [PIL.Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
        loaded = load(frames[0], "GIF", save_all=True, append_images=frames[1:])
        assert (loaded == [255, 0, 0]).all()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png(width: int, height: int) -> bytes:
    """Return a small file that claims to be a large picture."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", data)


class TestBadPhotos:
    def complaint(self, path) -> str:
        """Return the message, which must name the file and be one line."""
        with pytest.raises(plot.PhotoError) as caught:
            plot.load_photo(path)
        message = str(caught.value)
        assert isinstance(caught.value, ValueError)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        return message.removeprefix(f"{path}: ")

    def test_missing_folder_and_empty(self, tmp_path):
        assert self.complaint(tmp_path / "none.png") == "no such file"
        assert self.complaint(tmp_path) == "this is a folder, not a photo"
        (tmp_path / "empty.png").touch()
        assert self.complaint(tmp_path / "empty.png") == "the file is empty"
        assert "not a usable file name" in self.complaint("a" * 5000)
        with pytest.raises(plot.PhotoError, match=r"not a usable file name|no such file"):
            plot.load_photo("nul\0.png")

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
    def test_a_pipe_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.png")
        assert self.complaint(tmp_path / "pipe.png") == "this is not a regular file"

    def test_no_permission(self, tmp_path, monkeypatch):
        def refuse(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        path = tmp_path / "a.png"
        path.write_bytes(encode(PIL.Image.new("L", (4, 4)), "PNG"))
        with monkeypatch.context() as patch:  # the tests may run as root, whom chmod does not stop
            patch.setattr(PIL.Image, "open", refuse)
            assert self.complaint(path) == "no permission to read it"
        with monkeypatch.context() as patch:
            patch.setattr(Path, "stat", refuse)
            assert self.complaint(path) == "no permission to read it"

    @pytest.mark.parametrize(
        "content",
        [
            b"hello",
            bytes(1000),
            b"\x89PNG\r\n\x1a\n",
            b"\xff\xd8\xff",
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        ],
        ids=["text", "zeros", "only a PNG signature", "only a JPEG marker", "SVG", "EPS"],
    )
    def test_not_an_image(self, tmp_path, content):
        (tmp_path / "a.png").write_bytes(content)
        message = self.complaint(tmp_path / "a.png")
        assert message.startswith("not an image, or damaged from its first bytes on")
        assert "PNG, JPEG" in message

    @pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP", "PPM"])
    @pytest.mark.parametrize("part", [0.5, 0.9])
    def test_cut_short(self, tmp_path, format, part):
        content = encode(PIL.Image.fromarray(picture(64, 64)), format)
        (tmp_path / "a").write_bytes(content[: int(part * len(content))])
        message = self.complaint(tmp_path / "a")
        if format in ("PNG", "JPEG", "BMP", "PPM", "GIF"):  # where the decoder can tell
            assert message.startswith("the image is cut short, as by an interrupted copy")

    def test_damaged_inside(self, tmp_path):
        content = bytearray(encode(PIL.Image.fromarray(picture(64, 64)), "PNG"))
        content[60:90] = bytes(30)
        (tmp_path / "a.png").write_bytes(content)
        assert "damaged" in self.complaint(tmp_path / "a.png")

    @pytest.mark.parametrize("size", [(9500, 9500), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
    def test_absurdly_large(self, tmp_path, size):
        """The first only makes pillow warn; the others are more than twice its limit."""
        (tmp_path / "a.png").write_bytes(huge_png(*size))
        assert self.complaint(tmp_path / "a.png").startswith("too large: at most 89,478,485 pixels")

    def test_absurdly_large_where_pillow_was_told_not_to_care(self, tmp_path, monkeypatch):
        monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", None)
        (tmp_path / "a.png").write_bytes(huge_png(9500, 9500))
        message = self.complaint(tmp_path / "a.png")
        assert message.startswith("too large (9500 x 9500 pixels): at most 89,478,485")

    def test_out_of_memory(self, tmp_path, monkeypatch):
        def exhaust(*args, **kwargs):
            raise MemoryError

        (tmp_path / "a.png").write_bytes(encode(PIL.Image.new("L", (4, 4)), "PNG"))
        monkeypatch.setattr(PIL.Image, "open", exhaust)
        assert "memory" in self.complaint(tmp_path / "a.png")

    def test_white_unknown(self, tmp_path):
        PIL.Image.new("F", (4, 4), 0.5).save(tmp_path / "a.tif")
        assert "floating-point pixels" in self.complaint(tmp_path / "a.tif")
        PIL.Image.new("I", (4, 4), 70_000).save(tmp_path / "a.tif")
        assert "beyond 16 bits" in self.complaint(tmp_path / "a.tif")

    @given(
        format=st.sampled_from(["PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP", "PPM", "JPEG2000"]),
        damage=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
        cut=st.floats(0, 1),
    )
    def test_any_damage_gives_a_photo_or_a_complaint(self, tmp_path, format, damage, cut):
        content = bytearray(encode(PIL.Image.fromarray(picture(16, 16)), format))
        for place, value in damage:
            content[int(place * len(content))] = value
        path = tmp_path / "a"
        path.write_bytes(content[: int(cut * len(content))])
        try:
            photo = plot.load_photo(path)
        except plot.PhotoError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:
            assert photo.dtype == np.uint8
            assert photo.shape[2:] == (3,)


class TestSamplePhotos:
    def test_come_with_scikit_image(self):
        photos = plot.sample_photos()
        assert {name: photo.shape for name, photo in photos.items()} == {
            "chelsea": (300, 451, 3),
            "coffee": (400, 600, 3),
            "rocket": (427, 640, 3),
            "camera": (512, 512, 3),
            "astronaut": (512, 512, 3),
        }
        assert all(photo.dtype == np.uint8 and np.ptp(photo) > 200 for photo in photos.values())
        assert (photos["camera"] == photos["camera"][..., :1]).all()

    def test_are_those_of_scikit_image(self):
        data = pytest.importorskip("skimage.data")
        photos = plot.sample_photos()
        for name in ("chelsea", "coffee", "astronaut"):
            np.testing.assert_array_equal(photos[name], getattr(data, name)())

    def test_scikit_image_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "skimage", None)
        with pytest.raises(ModuleNotFoundError, match=r"scikit-image.*pip install 'jaxlrp\[demo\]'"):
            plot.sample_photos()

    def test_scikit_image_without_photos(self, tmp_path, monkeypatch):
        (tmp_path / "skimage").mkdir()
        (tmp_path / "skimage" / "__init__.py").touch()
        for name in [name for name in sys.modules if name.split(".")[0] == "skimage"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(plot.PhotoError, match="carries none of chelsea, coffee"):
            plot.sample_photos()


class TestWithoutPillow:
    @pytest.fixture(autouse=True)
    def _no_pillow(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "PIL", None)

    def test_maps_are_coloured(self):
        heat = plot.normalise(plot.box_smooth(plot.pool_channels(np.ones((2, 2, 3)))))
        assert plot.diverging(plot.upscale(heat, (4, 4))).shape == (4, 4, 3)
        assert plot.overlay(picture(2, 2), heat).shape == (2, 2, 3)

    def test_files_and_sheets_say_what_to_install(self, tmp_path):
        advice = pytest.raises(ModuleNotFoundError, match=r"needs pillow.*'jaxlrp\[demo\]'")
        with advice:
            plot.save_png(tmp_path / "a.png", picture(2, 2))
        with advice:
            plot.load_photo(tmp_path / "a.png")
        with advice:
            plot.contact_sheet([[picture(2, 2)]], ["a"], ["a"])
