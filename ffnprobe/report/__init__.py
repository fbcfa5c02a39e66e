"""What is left of a run for people: one HTML page, and a neuron's card."""

from .card import NeuronCard as NeuronCard
from .card import card_text as card_text
from .page import About as About
from .page import render as render
from .page import top_findings as top_findings
from .page import write_page as write_page
