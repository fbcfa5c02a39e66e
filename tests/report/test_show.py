"""Values for people: no character acts, no digit misleads."""

import unicodedata

import pytest

from ffnprobe.report.show import show, show_column, visible


def test_every_control_surrogate_and_line_separator_is_written_out():
    acting = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) in {"Cc", "Cs", "Zl", "Zp"}]
    assert all(visible(c) != c and visible(c).isprintable() for c in acting)


def test_everything_that_reorders_a_line_is_written_out():
    reordering = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    assert all(
        visible(chr(c)) != chr(c) for c in range(0x110000) if unicodedata.bidirectional(chr(c)) in reordering
    )


@pytest.mark.parametrize("text", ["مرحبا", "नमस्ते", "می\u200cخواهم", "👩\u200d🚀", "naïve ﬁ", "a b"])
def test_writing_is_left_alone(text):
    assert visible(text) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.31, "-0.31"),
        (1e-9, "1e-09"),
        (123456.7, "123457"),
        (float("nan"), "nan"),
        (True, "yes"),
        (7, "7"),
    ],
)
def test_show(value, text):
    assert show(value) == text


def test_a_column_has_one_number_of_decimals_but_loses_no_value():
    assert show_column([212.25, 96.0, float("nan")]) == ["212.2", "96.0", "nan"]
    assert show_column([1.0, 1e-6]) == ["1", "1e-06"]
    assert show_column([3, None, "x"]) == ["3", "–", "x"]
