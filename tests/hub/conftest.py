"""The tiny models and tokens of the analyzers' tests."""

from analyzers.conftest import planted as planted
from analyzers.conftest import tokens as tokens
