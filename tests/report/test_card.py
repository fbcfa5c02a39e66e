"""A neuron's card in a terminal: legible without colour, deaf to escape codes and markup."""

from io import StringIO

from rich.console import Console

from ffnprobe.report import NeuronCard, card_text
from ffnprobe.report.show import show


def printed(card: NeuronCard, **terminal) -> str:
    file = StringIO()
    Console(file=file, width=100, **terminal).print(card_text(card))
    return file.getvalue()


def test_trigger_is_marked_without_colour_and_numbers_stand_beside_their_null(neurons):
    text = printed(neurons[1])
    assert "neuron 0.7" in text
    assert "4.213  The ship sailed into the⏎« harbour» at dawn, and the" in text
    assert "·sea  ·port  shore" in text and "·the  ⏎" in text
    assert [line.split() for line in text.splitlines() if line.startswith("cos")] == [
        ["cos(key,", "value)", "-0.31", "0.042"]
    ]


def test_a_null_without_its_number_is_a_number():
    assert NeuronCard(0, 0, (), (), (), {"rate null": 0.5}).beside_null() == [("rate null", "0.5", "")]


def test_hostile_tokens_print_as_themselves(dressed, attack):
    card = dressed(attack)[2][0]
    text = printed(card)
    shown = show(attack)
    assert text.replace("\n", "").replace(" ", "").count(shown.replace(" ", "")) >= 4 or len(attack) > 100
    assert all(c.isprintable() or c == "\n" for c in text)


def test_colour_adds_only_our_own_codes(dressed, attacks):
    text = printed(dressed(attacks)[2][0], force_terminal=True, color_system="standard")
    codes = set(text.split("\x1b")[1:])
    assert codes and all(code.startswith(("[0m", "[1", "[2m", "[7m")) for code in codes)


def test_a_neuron_that_never_fired_says_so():
    assert "never fired" in printed(NeuronCard(0, 0, (), (), (), {}))
