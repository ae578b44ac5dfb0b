"""Pictures of evaluations: a plot a quantity, titles that stay inside."""

import math

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from avfusion.viz.plots import families, plot_clips, plot_lines, quantity


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: figures.append(figure))
    return figures


def test_accuracies_losses_and_counts_are_not_on_one_plot():
    scores = ["top-1", "chance", "mAP", "SDR", "SDR oracle", "SIR oracle", "left_out_mAP", "audio_to_image_median_rank",
              "chance_median_rank", "d_prime", "top-1 image", "AUC"]  # fmt: skip
    assert families(scores) == {
        "top-1": ["top-1", "top-1 image"], "SDR": ["SDR", "SDR oracle"], "dB": ["SIR oracle"], "d prime": ["d_prime"],
        "share": ["chance", "mAP", "AUC"], "rank": ["audio_to_image_median_rank", "chance_median_rank"],
    }  # fmt: skip


def test_legends_cover_no_line(drawn):
    for count in (1, 3):
        lines = {"top-1 of the picture alone": [0.2] * count, "chance": [0.1] * count, "top-1": [math.nan] * count}
        plot_lines("any.svg", list(range(count)), lines, xlabel="epoch", ylabel="share")
        (figure,) = drawn
        FigureCanvasAgg(figure).draw()
        (axis,) = figure.axes
        assert [line.get_label() for line in axis.lines] == list(lines)
        assert axis.get_legend().get_window_extent().width <= figure.bbox.width
        assert axis.get_legend().get_window_extent().y0 >= axis.get_window_extent().y1 - 1
        drawn.clear()


def test_names_that_are_not_known_are_shares():
    assert quantity("cIoU@0.5 other sound") == quantity("anything") == "share"


def test_long_titles_are_not_clipped(drawn):
    title = "is Male speech, man speaking; Inside, small room; Outside, urban or manmade\nsaid Music of Latin America"
    image, audio = torch.zeros(2, 3, 32, 32), torch.zeros(2, 1, 32, 64)
    plot_clips("worst.png", image, audio, [title, "short"])
    (figure,) = drawn
    FigureCanvasAgg(figure).draw()
    for axis in figure.axes:
        box = axis.title.get_window_extent()
        assert box.x0 >= 0
        assert box.y1 <= figure.bbox.height
    assert "".join(figure.axes[0].get_title().split()) == "".join(title.split())


def test_a_mixture_without_artefacts_does_not_flatten_the_rest(drawn):
    lines = {"SDR": [0.0, 3.0, 6.0], "SAR mixture": [140.0] * 3}
    plot_lines("any.svg", [0, 1, 2], lines, xlabel="epoch", ylabel="dB")
    assert drawn[0].axes[0].get_ylim()[1] == 50


def test_dollar_signs_in_titles_are_no_mathematics(drawn):
    plot_clips("any.png", torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8), [r"is $\frac$ said $_$"])
    FigureCanvasAgg(drawn[0]).draw()
