"""Which analyzers run is the user's choice, and what a model or a text does not allow is said."""

import pytest

from ffnprobe.corpus import Tokens
from ffnprobe.errors import InputError
from ffnprobe.report.analyses import ANALYSES, analyses_of, choose_analyzers
from ffnprobe.report.settings import Settings


def test_only_and_skip_choose_in_the_order_of_the_page():
    assert choose_analyzers(None, None) is None
    assert choose_analyzers("weight_rank, memories", None) == ("memories", "weight_rank")
    assert choose_analyzers(None, "memories") == tuple(name for name in ANALYSES if name != "memories")


def test_only_so_many_layers_as_take_time_are_counted():
    more = [ANALYSES[name].layers_more(30, 2) for name in ("hidden_rank", "experts", "contraction", "knockout")]
    assert more == [28, 3, 0, 0] and ANALYSES["experts"].layers_more(3, 2) == 1


@pytest.mark.parametrize(
    ("only", "skip", "said"),
    [
        ("memories", "weight_rank", "got both --only and --skip"),
        ("memory", None, "analyzer 'memory' is unknown: choose from hidden_rank, nonlinearity"),
        (None, ",".join(ANALYSES), "no analyzer is left"),
        (" ", None, "no analyzer is left"),
    ],
)
def test_a_choice_that_is_none_is_said(only, skip, said):
    with pytest.raises(InputError, match=said):
        choose_analyzers(only, skip)


def test_what_a_model_does_not_allow_is_left_out_and_said(model_of, tokens):
    model, said = model_of("bert"), []
    left = analyses_of(Settings("bert"), model, tokens(model), said.append)
    assert {"hidden_rank", "weight_rank"} < left.keys() < ANALYSES.keys()
    assert len(said) == len(ANALYSES) - len(left)
    assert any("knockout is left out: " in line and "predicts no next token" in line for line in said)


def test_losses_are_not_compared_on_one_document(model_of, tokens):
    model, said = model_of("gpt2"), []
    text = tokens(model, document=10**6)
    assert "knockout" not in analyses_of(Settings("gpt2"), model, text, said.append)
    assert any("knockout is left out: the text that is held out is of one document" in line for line in said)
    short = Tokens(text.ids[:1], text.document[:1], text.special[:1], {})
    assert "knockout" not in analyses_of(Settings("gpt2"), model, short, said.append)


def test_chosen_ones_alone_run(model_of, tokens):
    model = model_of("gpt2")
    settings = Settings("gpt2", analyzers=("memories",))
    assert list(analyses_of(settings, model, tokens(model))) == ["memories"]
