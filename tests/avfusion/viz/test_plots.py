"""Pictures of evaluations: an axis a quantity, titles that stay inside."""

import math

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from avfusion.viz.plots import plot_clips, plot_curve, quantity


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    return figures


def test_accuracies_losses_and_counts_are_not_on_one_axis(drawn, recwarn):
    scores = {"top-1": 0.4, "chance": 0.1, "mAP": 0.3, "SDR": 3.0, "SIR oracle": math.nan, "left_out_mAP": 7.0,
              "audio_to_image_median_rank": 12.0, "chance_median_rank": 50.5, "d_prime": 1.2}  # fmt: skip
    for epochs in (1, 3):  # a single row shows as points
        plot_curve("any.png", [{"step": 10 * i, "epoch": float(i)} | scores for i in range(epochs)])
        (figure,) = drawn
        FigureCanvasAgg(figure).draw()
        axes = {axis.get_ylabel(): [line.get_label() for line in axis.lines] for axis in figure.axes}
        assert axes == {"share": ["top-1", "chance", "mAP"], "dB": ["SDR", "SIR oracle"], "d prime": ["d_prime"],
                        "rank": ["audio_to_image_median_rank", "chance_median_rank"]}  # fmt: skip
        for axis in figure.axes:
            assert axis.get_legend().get_window_extent().width <= figure.bbox.width / len(figure.axes)
            assert axis.get_legend().get_window_extent().y0 >= axis.get_window_extent().y1 - 1  # covers no line
        drawn.clear()
    assert not recwarn.list


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
    plot_curve("any.png", [{"step": i, "epoch": float(i), "SDR": 3.0 * i, "SAR mixture": 140.0} for i in range(3)])
    assert drawn[0].axes[0].get_ylim()[1] == 50


def test_dollar_signs_in_titles_are_no_mathematics(drawn):
    plot_clips("any.png", torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8), [r"is $\frac$ said $_$"])
    FigureCanvasAgg(drawn[0]).draw()
